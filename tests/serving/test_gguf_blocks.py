"""int4 experts in a GGUF file; the witness is the gguf package's own reader of Q4_0."""

import numpy as np
import pytest
import torch

from deepseek_kernels.four_bit import FourBitFormat, PackedMatrices, quantize_int4
from deepseek_serving.gguf_blocks import q4_0_blocks
from deepseek_serving.gguf_export import export_gguf
from deepseek_training.data.tokenizer import train_tokenizer
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM, quantize_experts
from modeling_deepseek.packed_checkpoint import save_packed

gguf = pytest.importorskip("gguf")
Q4_0 = gguf.GGMLQuantizationType.Q4_0
SIZES = {"hidden_size": 32, "moe_intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 300}


def read(blocks):
    return torch.from_numpy(gguf.quants.dequantize(np.asarray(blocks), Q4_0))


def test_every_code_and_scale_is_read_as_it_was_packed():
    matrix = torch.randn(24, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, scales = quantize_int4(matrix, 32)
    stack = PackedMatrices(codes[None], scales[None], (1, 24, 96), FourBitFormat("int4", 32), torch.float32)
    assert torch.equal(read(q4_0_blocks(codes, scales).numpy()), stack[0])


def test_scales_in_fp32_are_rounded_to_fp16_and_nothing_else():
    codes, scales = quantize_int4(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), 32)
    stack = PackedMatrices(codes[None], scales.half()[None], (1, 8, 64), FourBitFormat("int4", 32), torch.float32)
    assert torch.equal(read(q4_0_blocks(codes, scales).numpy()), stack[0])


def test_scales_beyond_fp16_and_other_groups_are_refused():
    codes, scales = quantize_int4(torch.full((2, 64), 1e7), 32)
    with pytest.raises(ValueError, match="which fp16 cannot hold"):
        q4_0_blocks(codes, scales)
    with pytest.raises(ValueError, match="expected groups of 32"):
        q4_0_blocks(*quantize_int4(torch.ones(2, 64), 16))


def quantized(folder, group_size):
    torch.manual_seed(0)
    config = DeepseekConfig.from_preset("debug", **SIZES, num_experts_per_tok=2, min_experts_per_tok=None)
    model = quantize_experts(DeepseekForCausalLM(config).bfloat16(), format="int4", group_size=group_size)
    save_packed(model, folder)
    train_tokenizer(["a fox and a crow sat on a wall in 1999"] * 4, config.vocab_size).save_pretrained(folder)
    return model


def test_a_files_experts_are_the_models_bit_for_bit(tmp_path):
    model = quantized(tmp_path, 32)
    reader = gguf.GGUFReader(export_gguf(tmp_path, tmp_path / "model.gguf"))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    experts = model.model.layers[1].mlp.experts.four_bit
    down, gate_up = (experts.matrices(name, torch.float32) for name in ("down_proj", "gate_up_proj"))
    for name, expected in {
        "down": [down[e].clone() for e in range(8)],
        "gate": [gate_up[e][:64].clone() for e in range(8)],
        "up": [gate_up[e][64:].clone() for e in range(8)],
    }.items():
        tensor = tensors[f"blk.1.ffn_{name}_exps.weight"]
        assert tensor.tensor_type == Q4_0 and list(tensor.shape) == [*reversed(expected[0].shape), 8]
        assert torch.equal(read(tensor.data), torch.stack(expected))


def test_groups_without_a_block_type_are_refused_in_one_line(tmp_path):
    quantized(tmp_path, 16)
    with pytest.raises(ValueError, match="quantization_config with group_size=16, where Q4_0 has 32") as error:
        export_gguf(tmp_path, tmp_path / "model.gguf")
    assert "\n" not in str(error.value) and not (tmp_path / "model.gguf").exists()
