"""What transformers drops of multi-token prediction is in every later save, byte for byte, and drafts as before."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import TINY
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
)

from deepseek_records.kept_mtp import keep_mtp, mtp_files
from deepseek_records.loading import load_model
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM
from modeling_deepseek.draft_acceptance import count_drafts


@pytest.fixture(scope="module")
def v3_path(tmp_path_factory):
    """A stock DeepSeek-V3 of three layers and, as released, one prediction layer in the same files."""
    path = tmp_path_factory.mktemp("v3")
    torch.manual_seed(0)
    DeepseekV3ForCausalLM(DeepseekV3Config(**{**TINY, "num_nextn_predict_layers": 1})).save_pretrained(path)
    settings = {**TINY, "num_nextn_predict_layers": 1, "mtp_loss_coef": 0.3}
    DeepseekForCausalLM(DeepseekConfig(**settings)).save_pretrained(path / "ours")
    drafts = {name: t for name, t in load_file(path / "ours/model.safetensors").items() if ".layers.3." in name}
    assert drafts
    save_file({**load_file(path / "model.safetensors"), **drafts}, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def glm_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("glm")
    torch.manual_seed(0)
    config = Glm4MoeConfig(
        vocab_size=97, hidden_size=32, intermediate_size=44, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, n_routed_experts=4, num_experts_per_tok=2,
        first_k_dense_replace=1, pad_token_id=0,
    )  # fmt: skip
    Glm4MoeForCausalLM(config).save_pretrained(path)
    drafts = {
        "model.layers.2.eh_proj.weight": torch.randn(32, 64),
        "model.layers.2.mlp.experts.3.up_proj.weight": torch.randn(24, 32).bfloat16(),
        "model.layers.2.embed_tokens.weight": torch.randn(97, 32),
    }
    save_file({**load_file(path / "model.safetensors"), **drafts}, path / "model.safetensors", {"format": "pt"})
    return path


def load_kept(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    assert type(model).__name__ == "DeepseekV3ForCausalLM" and keep_mtp(model)
    return model


def tensors_of(path):
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def mtp_of(path, first):
    tensors = tensors_of(path).items()
    return {n: t for n, t in tensors if n.startswith(f"model.layers.{first}.") and "embed_tokens" not in n}


def assert_kept(source, saved, first):
    wanted, found = mtp_of(source, first), mtp_of(saved, first)
    assert wanted and wanted.keys() == found.keys()
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted)
    index = json.loads((saved / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == tensors_of(saved).keys() and all((saved / file).is_file() for file in index.values())


@pytest.mark.parametrize(("family", "first"), [("v3", 3), ("glm", 2)])
def test_in_a_later_save_byte_for_byte(family, first, request, tmp_path):
    source = request.getfixturevalue(f"{family}_path")
    model = AutoModelForCausalLM.from_pretrained(source)
    assert keep_mtp(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "once")
    assert_kept(source, tmp_path / "once", first)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "once", output_loading_info=True)
    assert not info["missing_keys"]
    assert all(torch.equal(before[name], tensor) for name, tensor in again.state_dict().items())
    keep_mtp(again)
    again.save_pretrained(tmp_path / "once")  # over its own source
    assert_kept(source, tmp_path / "once", first)
    again.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert_kept(source, tmp_path / "shards", first)


def test_drafts_are_accepted_as_before(v3_path, tmp_path):
    counts, texts = [], []
    for path in (v3_path, tmp_path):
        model = load_kept(path)
        with count_drafts(model) as drafts:
            prompt = torch.tensor([[5, 6, 7, 8]])
            texts.append(model.generate(prompt, max_new_tokens=20, do_sample=False, use_mtp=True, eos_token_id=None))
        counts.append((drafts.num_drafted, drafts.num_accepted, drafts.num_passes))
        model.save_pretrained(tmp_path)
    assert counts[0] == counts[1] and counts[0][0] > 0 and torch.equal(*texts)


def test_lora_and_merging_leave_them(v3_path, tmp_path):
    model = load_kept(v3_path)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*"))
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_kept(v3_path, tmp_path / "merged", 3)
    name = "model.layers.0.self_attn.o_proj.weight"
    assert not torch.equal(tensors_of(tmp_path / "merged")[name], tensors_of(v3_path)[name])


def test_a_copy_saves_its_own_weights(v3_path, tmp_path):
    model = load_kept(v3_path)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    twin.save_pretrained(tmp_path)
    assert not tensors_of(tmp_path)["lm_head.weight"].any() and model.lm_head.weight.any()
    assert_kept(v3_path, tmp_path, 3)


def test_what_the_stages_load_keeps_them(glm_path, tmp_path):
    load_model(glm_path).save_pretrained(tmp_path)
    assert_kept(glm_path, tmp_path, 2)


def test_a_model_without_them_is_left_alone(tmp_path):
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**TINY))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not keep_mtp(loaded) and type(loaded) is DeepseekV3ForCausalLM
    assert not mtp_files(loaded, "no/such-model")


def test_fp8_is_refused_in_one_line(glm_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(glm_path)
    model.save_pretrained(tmp_path)
    scale = {"model.layers.2.eh_proj.weight_scale_inv": torch.ones(1, 1)}
    save_file({**load_file(tmp_path / "model.safetensors"), **scale}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"^mtp: got model\.layers\.2\.eh_proj\.weight_scale_inv, expected no FP8"):
        keep_mtp(model, tmp_path)


def test_a_source_that_is_gone_is_told_after_the_weights_are_saved(v3_path, tmp_path):
    model = load_kept(v3_path)
    model.mtp_files = {name: tmp_path / "gone" / path.name for name, path in model.mtp_files.items()}
    with pytest.raises(FileNotFoundError, match=r"^mtp: .* is gone"):
        model.save_pretrained(tmp_path / "saved")
    assert "lm_head.weight" in tensors_of(tmp_path / "saved")
