"""A checkpoint between two others: torch arithmetic to the bit, the bytes of the inputs at the ends, refusals."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepseek_training.continual.merge_weights import merge_weights
from deepseek_training.data.tokenizer import train_tokenizer
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM


def save(folder, *, seed, dtype=torch.float32, shard="1GB"):
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(["a tale of two models"] * 3, 270)
    model = DeepseekForCausalLM(DeepseekConfig.from_preset("debug", vocab_size=len(tokenizer))).to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    return save(root / "old", seed=0), save(root / "new", seed=1)


def tensors(folder):
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.9])
def test_it_is_torch_arithmetic_to_the_bit(pair, tmp_path, alpha):
    old, new, found = tensors(pair[0]), tensors(pair[1]), tensors(merge_weights(*pair, tmp_path / "between", alpha))
    assert found.keys() == old.keys()
    for name, value in found.items():
        if name.endswith("e_score_correction_bias"):
            expected = new[name] if alpha >= 0.5 else old[name]
        else:
            expected = torch.lerp(old[name], new[name], alpha)
        assert torch.equal(value, expected), name
    ids = torch.arange(3, 40)[None]
    whole = DeepseekForCausalLM.from_pretrained(tmp_path / "between").eval()
    assert whole(input_ids=ids).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_rounded_once(tmp_path, dtype):
    pair = save(tmp_path / "old", seed=0, dtype=dtype), save(tmp_path / "new", seed=1, dtype=dtype)
    old, new, found = tensors(pair[0]), tensors(pair[1]), tensors(merge_weights(*pair, tmp_path / "between", 0.3))
    floats = [name for name in old if old[name].dtype == dtype and not name.endswith("correction_bias")]
    assert floats and all(
        torch.equal(found[name], torch.lerp(old[name].float(), new[name].float(), 0.3).to(dtype)) for name in floats
    )


def test_the_ends_are_the_inputs_byte_for_byte(pair, tmp_path):
    for alpha, source in ((0, pair[0]), (1, pair[1])):
        found = merge_weights(*pair, tmp_path / f"at{alpha}", alpha)
        assert (found / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_shards_of_any_cut(pair, tmp_path):
    cut = save(tmp_path / "cut", seed=1, shard="200KB")
    assert len(list(cut.glob("*.safetensors"))) > 1
    whole, other = merge_weights(*pair, tmp_path / "a", 0.4), merge_weights(pair[0], cut, tmp_path / "b", 0.4)
    first, second = tensors(whole), tensors(other)
    assert all(torch.equal(first[name], second[name]) for name in first) and first.keys() == second.keys()
    AutoModelForCausalLM.from_pretrained(other)
    AutoTokenizer.from_pretrained(other)


def test_other_models_are_refused(pair, tmp_path):
    def changed(what, **settings):
        folder = shutil.copytree(pair[1], tmp_path / what)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **settings}))
        return folder

    wider = changed("config", num_experts_per_tok=2)
    other_tokens = changed("tokens")
    train_tokenizer(["quite other words"] * 3, 270).save_pretrained(other_tokens)
    missing, cut = changed("missing"), changed("cut")
    kept = tensors(missing)
    kept.pop("model.norm.weight")
    save_file(kept, missing / "model.safetensors", {"format": "pt"})
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    training = changed("training", router_bias_update_speed=0.5)  # not the model's
    merge_weights(pair[0], training, tmp_path / "fine", 0.5)
    for new, alpha, message in (
        (wider, 0.5, "which differ in num_experts_per_tok"),
        (other_tokens, 0.5, "tokenizer: got different ones"),
        (missing, 0.5, "got model.norm.weight in one checkpoint only"),
        (cut, 0.5, "cut short"),
        (pair[1], 1.5, "alpha: got 1.5, expected a number in [0, 1]"),
        (tmp_path / "nowhere", 0.5, "nowhere"),
    ):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            merge_weights(pair[0], new, tmp_path / "out", alpha)
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError):
        merge_weights(*pair, pair[0], 0.5)
