"""Kernels on 4-bit codes: the dense copy bit for bit, and the layer by codes and by copies.

Like ``test_triton_kernels.py`` these run on a GPU, or in a process started with TRITON_INTERPRET=1, which
``test_in_interpreter.py`` starts.
"""

import os

import pytest
import torch

pytest.importorskip("triton")
if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from epilogue_cases import EPILOGUES
from four_bit_cases import assert_equals_reference, pack, packed_case, results, unpacked
from lora_cases import leaves_of, make_lora_case
from moe_cases import also

from deepseek_kernels.four_bit import FourBitFormat
from deepseek_kernels.fused_moe import fused_moe
from deepseek_kernels.fused_moe_four_bit import fused_moe_four_bit
from deepseek_kernels.gpu import experts as fused_moe_gpu
from deepseek_kernels.gpu import four_bit_experts
from deepseek_kernels.gpu.four_bit_dequantize import dense
from deepseek_kernels.gpu.tiles import ROW_BUCKETS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Format, group, H, I. Rows that are no multiple of the interpreter's 32 columns nor of a GPU's 128; groups shorter and
# longer than a step of the inner loop.
SHAPES = {
    "int4": ("int4", 8, 40, 24),
    "nf4": ("nf4", 8, 24, 40),
    "int4 long groups": ("int4", 64, 64, 64),
    "nf4 whole rows": ("nf4", 32, 96, 32),
}
pytestmark = pytest.mark.usefixtures("guarded_buffers")


def case_of(shape, dtype=torch.bfloat16, **settings):
    name, group, hidden, width = SHAPES[shape]
    sizes = {"T": 5, "E": 3, "K": 2, **settings}
    return packed_case(dtype, name, group, H=hidden, I=width, device=DEVICE, **sizes)


def made_dense(monkeypatch):
    """Have every forward pass take the dense copies; the list of their shapes."""
    made, original = [], fused_moe_gpu.dense

    def watch(weights, expert_start=None):
        made.append(tuple(weights.shape))
        return original(weights, expert_start)

    monkeypatch.setattr(fused_moe_gpu, "dense", watch)
    return made


@pytest.mark.parametrize(("name", "group"), [("int4", 8), ("int4", 32), ("int4", 128), ("nf4", 8), ("nf4", 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_dense_copy_is_the_weights_bit_for_bit(name, group, dtype):
    stack = torch.randn(3, 24, 128, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    stack[1, 0, :8] = 0
    packed = pack(stack, FourBitFormat.of(4, name, group))
    for read in {dtype, torch.bfloat16}:
        one = packed.to(read)
        assert torch.equal(dense(one), unpacked(one))


def test_a_dense_copy_of_more_than_one_block_and_of_groups_over_two_rows():
    # 72 * 130 / 8 words are one block and a part of one; 130 is no multiple of 16.
    stack = torch.randn(2, 72, 130, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    packed = pack(stack, FourBitFormat.of(4, "nf4", 16))
    assert torch.equal(dense(packed), unpacked(packed))


def test_experts_without_rows_are_not_copied():
    packed = pack(torch.randn(3, 8, 32, device=DEVICE), FourBitFormat.of(4, "int4", 32))
    copied = dense(packed, torch.tensor([0, 0, 2, 2], dtype=torch.int32, device=DEVICE))
    assert torch.equal(copied[1], packed[1]) and copied[0].isnan().all() and copied[2].isnan().all()


@pytest.mark.parametrize("shape", ["int4", "nf4", *also("int4 long groups", "nf4 whole rows")])
def test_layer_by_codes(shape, monkeypatch):
    made = made_dense(monkeypatch)
    case = case_of(shape)[:5]
    got = results(case)
    assert made == [tuple(case[2].shape), tuple(case[1].shape)], "only the backward pass takes copies"
    assert_equals_reference(got, case, torch.bfloat16)


@pytest.mark.parametrize("shape", ["int4", *also("nf4", "int4 long groups", "nf4 whole rows")])
def test_layer_by_copies(shape, monkeypatch):
    monkeypatch.setattr(fused_moe_gpu, "packed_tiles", lambda *arguments: None)
    case = case_of(shape)[:5]
    assert_equals_reference(results(case), case, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, *also(torch.float16)])
def test_other_dtypes(dtype):
    """fp32 takes copies, which no tensor core multiplies; fp16 its own codes."""
    case = case_of("nf4", dtype)[:5]
    assert_equals_reference(results(case), case, dtype)


@pytest.mark.parametrize("name", ["gpt_oss", *also("deepseek_v4", "minimax_m3", "interleaved", "gelu")])
def test_epilogues_and_biases(name):
    case = case_of("int4")
    assert_equals_reference(results(case, EPILOGUES[name]), case, torch.bfloat16, EPILOGUES[name])


@pytest.mark.slow
def test_adapters_on_codes_are_adapters_on_the_weights_read_back():
    """Bit for bit, with every gradient: the kernels are the same, and read copies."""
    case = make_lora_case(torch.bfloat16, T=5, H=24, I=16, E=3, K=2, device=DEVICE)
    packed = [pack(case[name], FourBitFormat.of(4, "nf4", 8)) for name in ("gate_up_proj", "down_proj")]
    factors = {name: case[name] for name in ("gate_up_lora", "down_lora")}
    outcomes = []
    for layer, stacks in ((fused_moe_four_bit, packed), (fused_moe, [unpacked(one) for one in packed])):
        output = layer(case["x"], *stacks, case["ids"], case["weights"], **factors)
        outcomes.append([output, *torch.autograd.grad(output, leaves_of(case), case["grad"])])
    assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))


@pytest.mark.parametrize("pattern", ["all_unused", *also("empty_experts", "one_expert")])
def test_patterns(pattern):
    case = case_of("int4", T=4, pattern=pattern)[:5]
    assert_equals_reference(results(case), case, torch.bfloat16)


@pytest.mark.parametrize("T", [0, 2])
def test_no_gradients_change_nothing(T):
    case = case_of("nf4", T=T)[:5]
    operands = (case[0].detach(), *case[1:4], case[4].detach(), "silu")
    alone, kept, _ = fused_moe_gpu.forward(*operands, False)
    with_gradients, preactivation, _ = fused_moe_gpu.forward(*operands, True)
    assert torch.equal(alone, with_gradients) and kept.shape[0] == 0 and preactivation.shape[0] == T * 2


def test_many_rows_and_what_kernels_do_not_read_take_copies():
    def tiles(group_size, rows, dtype=torch.bfloat16, name="nf4"):
        fmt = FourBitFormat.of(4, name, group_size)
        stacks = [pack(torch.ones(2, 16, 48, device=DEVICE), fmt), pack(torch.ones(2, 48, 8, device=DEVICE), fmt)]
        ids = torch.zeros(rows, 1, dtype=torch.int64, device=DEVICE)
        return four_bit_experts.packed_tiles(torch.ones(rows, 48, dtype=dtype, device=DEVICE), *stacks, ids)

    most = ROW_BUCKETS[-1] * 2
    assert tiles(8, most) and not tiles(8, most + 1)
    assert not tiles(16, 8), "groups over two rows of down_proj"
    assert not tiles(24, 8), "groups that are no part of a tile"
    assert not tiles(8, 8, torch.float32)
