"""What can be wrong with a checkpoint is told in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from deepseek_records.loading import load_model, load_tokenizer, merge_adapter, resolve_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A Llama of a few thousand parameters in two shards."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def one_line(caught: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_loads_from_its_folder_and_from_its_run(checkpoint, tmp_path):
    tokens = torch.arange(5)[None]
    expected = load_model(checkpoint)(tokens).logits
    shutil.copytree(checkpoint, tmp_path / "run" / "model")
    assert resolve_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "model")
    assert torch.equal(load_model(tmp_path / "run")(tokens).logits, expected)


@pytest.mark.parametrize("name", ["./absent", "/nowhere/at/all", "a/b/c", "absent/"])
def test_a_missing_folder(name):
    with pytest.raises(FileNotFoundError, match="does not exist") as caught:
        load_model(name)
    one_line(caught)


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config.json") as caught:
        load_model(tmp_path)
    one_line(caught)


def test_a_broken_index_of_any_model(copy):
    index = copy / "model.safetensors.index.json"
    index.write_text(index.read_text()[:-40])
    with pytest.raises(ValueError, match=rf"^index: {index}: got no JSON \(") as caught:
        load_model(copy)
    one_line(caught)


def test_a_file(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="is a file, expected a checkpoint folder") as caught:
        load_model(tmp_path / "model.bin")
    one_line(caught)


def test_a_hub_id_without_network(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for load in (load_model, load_tokenizer):
        with pytest.raises(
            ValueError, match="not a local folder and could not be fetched from the Hub; pass a"
        ) as caught:
            load("nobody/nothing-of-that-name")
        one_line(caught)


@pytest.mark.parametrize("size", [0, 7, 100, -16])
def test_weights_cut_short(copy, size):
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_model(copy)
    assert str(copy) in one_line(caught)


def test_a_missing_shard(copy):
    sorted(copy.glob("*.safetensors"))[-1].unlink()
    with pytest.raises(FileNotFoundError, match="is not whole") as caught:
        load_model(copy)
    one_line(caught)


def test_a_broken_config(copy):
    (copy / "config.json").write_text((copy / "config.json").read_text()[:50])
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_model(copy)
    assert "config.json" in one_line(caught)


BROKEN = [
    ("", "got no JSON"),
    ("[1]", "holds list, expected an object"),
    ("[" * 100_000, "got no JSON"),
    ("\xff", "got no JSON"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN, ids=["empty", "list", "nested", "binary"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_broken_json_file_is_named(copy, name, content, message):
    (copy / name).write_bytes(content.encode("latin-1"))
    for load in (load_tokenizer, load_model) if name == "config.json" else (load_tokenizer,):
        with pytest.raises(ValueError, match=f"{copy / name}:? {message}") as caught:
            load(copy)
        one_line(caught)


def test_a_setting_of_the_wrong_type(copy):
    config = json.loads((copy / "config.json").read_text())
    for model_type in ("llama", "deepseek_moe"):
        (copy / "config.json").write_text(json.dumps({**config, "model_type": model_type, "hidden_size": "x"}))
        with pytest.raises(ValueError, match=f"model: {copy} .*hidden_size") as caught:
            load_model(copy)
        one_line(caught)


def test_an_unknown_architecture(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "nothing_known"}))
    with pytest.raises(ValueError, match="nothing_known") as caught:
        load_model(copy)
    one_line(caught)


def test_no_tokenizer(copy):
    with pytest.raises(FileNotFoundError, match=f"tokenizer: {copy} holds none, expected tokenizer.json") as caught:
        load_tokenizer(copy)
    one_line(caught)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, vocab_size=97)
    deep, base = (LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=depth)) for depth in (2, 1))
    base.save_pretrained(tmp_path / "base")
    get_peft_model(deep, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"^adapter: .* \(2 of its 4 tensors belong to no module, .*layers\.1\."):
        merge_adapter(str(tmp_path / "adapter"), str(tmp_path / "base"))


def test_a_link_is_followed_once(tmp_path):
    """A link that moves while a model is loaded must not mix two models."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    link = tmp_path / "current"
    link.symlink_to("one")
    assert resolve_checkpoint(link) == str(tmp_path / "one")
    link.unlink()
    link.symlink_to("two")
    assert resolve_checkpoint(link) == str(tmp_path / "two")
