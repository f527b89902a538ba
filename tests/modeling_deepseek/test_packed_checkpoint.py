"""int4 experts in compressed-tensors' files: the names of each family's own checkpoint, read without decoding."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_expert_adapters import IDS, logits
from test_four_bit_experts import GATED, build
from tiny_families import build_tiny, logits_of, token_ids
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from deepseek_records.loading import load_model
from modeling_deepseek import FourBitExpertsConfig, quantize_experts
from modeling_deepseek.packed_checkpoint import packed_settings, save_packed

NAMES = {
    "qwen3_moe": "model.layers.0.mlp.experts.3.gate_proj.weight_packed",
    "mixtral": "model.layers.0.block_sparse_moe.experts.3.w1.weight_packed",
}


def saved(folder, name="qwen3_moe", dtype=torch.float32):
    model = quantize_experts(build(name, dtype), format="int4", group_size=8)
    save_packed(model, folder)
    return model


@pytest.mark.parametrize("name", GATED)
def test_what_is_loaded_computes_the_same_and_saves_again(name, tmp_path):
    expected = logits(saved(tmp_path / "packed", name))
    model = load_model(tmp_path / "packed")
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_model(tmp_path / "again")), expected)


def test_experts_with_a_gate_of_their_own_are_loaded_too(tmp_path):
    """DeepSeek-V4 clamps; what its gate computes is found out while the model is still on the meta device."""
    model = build_tiny("transformers.models.deepseek_v4.modeling_deepseek_v4", "DeepseekV4Experts").eval()
    save_packed(quantize_experts(model, format="int4", group_size=8), tmp_path)
    with torch.no_grad():
        expected, found = (logits_of(one, token_ids()) for one in (model, load_model(tmp_path)))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", [name for name in NAMES if name in GATED])
def test_files_are_named_and_described_as_the_format_says(name, tmp_path):
    model = saved(tmp_path, name)
    tensors = load_file(tmp_path / "model.safetensors")
    key = NAMES[name]
    packed, stem = tensors[key], key.removesuffix("packed")
    codes = model.model.layers[0].mlp.experts.four_bit.gate_up_codes[3]
    assert torch.equal(packed, codes[: len(codes) // 2]) and packed.dtype == torch.int32
    assert tensors[stem + "shape"].tolist() == [packed.shape[0], 8 * packed.shape[1]]
    assert tensors[stem + "scale"].shape == (packed.shape[0], packed.shape[1])  # groups of 8: one a word
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["format"]) == ("compressed-tensors", "pack-quantized")
    assert settings["config_groups"]["group_0"]["weights"]["group_size"] == 8
    assert any("q_proj" in one for one in settings["ignore"]) and any("lm_head" in one for one in settings["ignore"])
    assert not any("four_bit" in name or name.endswith("gate_up_proj") for name in tensors)


def test_stock_transformers_reads_the_same_model_with_scales_of_either_sign(tmp_path):
    pytest.importorskip("compressed_tensors")
    packed = saved(tmp_path / "positive")
    scales = [buffer for name, buffer in packed.named_buffers() if name.endswith("_scales")]
    for one in scales:
        one[..., ::2] *= -1
    assert scales
    save_packed(packed, tmp_path)
    expected = logits(packed)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.model.layers[0].mlp.experts.gate_up_proj.is_floating_point()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """The elements of the largest float tensor that an operator makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            is_new = isinstance(one, torch.Tensor) and one.device.type == "cpu" and one.is_floating_point()
            if is_new and one.untyped_storage().nbytes() >= one.nbytes:  # an expanded number takes no memory
                self.elements = max(self.elements, one.numel())
        return result


def test_no_dense_stack_is_made_and_a_weight_takes_about_half_a_byte(tmp_path):
    model = build(dtype=torch.bfloat16)
    model.config.moe_intermediate_size = 128
    model = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    settings = {"format": "int4", "group_size": 16}
    save_packed(quantize_experts(model, **settings), tmp_path)
    with Largest() as largest:
        loaded = load_model(tmp_path)
        logits(loaded)
    experts = loaded.model.layers[0].mlp.experts
    one_expert = experts.gate_up_proj[0].numel()
    others = max(p.numel() for n, p in loaded.named_parameters() if "experts" not in n)
    assert largest.elements <= max(one_expert, others, IDS.numel() * 8 * 2 * 128)
    assert largest.elements < experts.gate_up_proj.numel()
    weights = sum(parameter.numel() for parameter in (experts.gate_up_proj, experts.down_proj))
    assert sum(buffer.nbytes for buffer in experts.four_bit.buffers()) == weights * (1 / 2 + 2 / 16)


def test_groups_of_128_with_bfloat16_scales_take_0_516_bytes():
    model = build()
    config = type(model.config)(**{**model.config.to_dict(), "hidden_size": 128, "moe_intermediate_size": 128})
    model = quantize_experts(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), format="int4")
    experts = model.model.layers[0].mlp.experts
    weights = experts.gate_up_proj.numel() + experts.down_proj.numel()
    assert sum(buffer.nbytes for buffer in experts.four_bit.buffers()) / weights == 0.515625


def test_what_holds_other_packed_layers_or_other_codes_is_not_ours(tmp_path):
    saved(tmp_path / "ours")
    assert packed_settings(tmp_path / "ours") == {
        **{"bits": 4, "format": "int4", "group_size": 8, "layout": "pack-quantized"}
    }
    assert packed_settings(tmp_path / "nothing") is None
    other = shutil.copytree(tmp_path / "ours", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight_packed"] = torch.zeros(1, 1, dtype=torch.int32)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert packed_settings(other) is None
    for place, value in {"symmetric": False, "num_bits": 8}.items():
        path = tmp_path / "ours" / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"]["config_groups"]["group_0"]["weights"][place] = value
        path.write_text(json.dumps(config))
        assert packed_settings(tmp_path / "ours") is None


def test_the_layout_is_kept_in_the_settings():
    config = FourBitExpertsConfig(format="int4", layout="pack-quantized")
    assert FourBitExpertsConfig.from_dict(config.to_dict()).layout == "pack-quantized"
