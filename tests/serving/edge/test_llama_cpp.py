"""The GGUF file in llama.cpp: greedy text against transformers.

Needs xllamacpp, which brings llama.cpp ready built: `make edge-setup` puts it into build/edge/llama_cpp.
`tests/serving/test_gguf_llama_cpp.py` compares logits too, by another package that has to be compiled.
"""

import ctypes
from pathlib import Path

import pytest
import torch
from edge_models import PROMPTS, ROUTERS, greedy, make_ours, make_tokenizer

from deepseek_cli.benchmarks.edge_runner import load_llama_cpp
from deepseek_kernels.four_bit import FourBitFormat, PackedMatrices, quantize_int4
from deepseek_serving.gguf_blocks import q4_0_blocks
from deepseek_serving.gguf_export import export_gguf
from modeling_deepseek import dequantize_experts, quantize_experts
from modeling_deepseek.packed_checkpoint import save_packed

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not on the path; make test-edge runs this with it")
pytest.importorskip("gguf")
pytestmark = pytest.mark.slow
NUM_NEW = 24


@pytest.mark.parametrize("router", ["sigmoid", "softmax"])
def test_greedy_text_of_20_prompts(router, tmp_path):
    settings = {key: value for key, value in ROUTERS[router].items() if key != "norm_type"}
    model, tokenizer = make_ours(**settings), make_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write = load_llama_cpp(export_gguf(tmp_path / "model", tmp_path / "model.gguf"))()
    ends = 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        wanted = greedy(model, ids, NUM_NEW)
        assert write(ids, NUM_NEW) == wanted, prompt
        ends += tokenizer.eos_token_id in wanted[:-1]
    assert router != "sigmoid" or ends  # some text goes on behind an end token


def test_llama_cpp_reads_every_weight_of_the_blocks_as_it_was_packed():
    matrix = torch.randn(24, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    scales = (matrix.float().view(24, 3, 32).abs().amax(2) / 7.5) * torch.tensor([1.0, -1.0, 0.75])  # of either sign
    codes, kept = quantize_int4(matrix, 32, scales)
    stack = PackedMatrices(codes[None], kept[None], (1, 24, 96), FourBitFormat("int4", 32), torch.float32)
    blocks, read = q4_0_blocks(codes, kept).contiguous(), torch.empty(24, 96)
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    library.dequantize_row_q4_0.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    library.dequantize_row_q4_0.restype = None
    library.dequantize_row_q4_0(blocks.data_ptr(), read.data_ptr(), read.numel())
    assert torch.equal(read, stack[0])


def test_int4_experts_go_on_with_the_same_token(tmp_path):
    """llama.cpp multiplies Q4_0 by inputs in 8 bits, so that near ties may fall otherwise, and few do."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts_per_tok": 2, "min_experts_per_tok": None}
    model, tokenizer = make_ours(**sizes), make_tokenizer()
    for experts in (module for module in model.modules() if hasattr(module, "gate_up_proj")):
        experts.gate_up_proj.data *= 4  # or the experts would change hardly a token
        experts.down_proj.data *= 4
    save_packed(quantize_experts(model, format="int4", group_size=32), tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write = load_llama_cpp(export_gguf(tmp_path / "model", tmp_path / "model.gguf"))()
    written = [write(tokenizer(prompt).input_ids, 1) for prompt in PROMPTS]
    wanted = [greedy(model, tokenizer(prompt).input_ids, 1) for prompt in PROMPTS]
    assert sum(one == other for one, other in zip(written, wanted, strict=True)) >= 17
    dequantize_experts(model)
    for experts in (module for module in model.modules() if hasattr(module, "gate_up_proj")):
        experts.down_proj.data = experts.down_proj.data.flip(0)  # the experts of one another
    others = [greedy(model, tokenizer(prompt).input_ids, 1) for prompt in PROMPTS]
    assert sum(one == other for one, other in zip(written, others, strict=True)) <= 12
