"""4-bit experts on a GPU at the sizes of a real layer: the weights bit for bit, the layer tile by tile, memory."""

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from four_bit_cases import pack, unpacked

from deepseek_kernels.expert_loop import TILE_TOLERANCE, expert_loop, largest_tile_error
from deepseek_kernels.four_bit import FourBitFormat
from deepseek_kernels.fused_moe import fused_moe
from deepseek_kernels.fused_moe_four_bit import fused_moe_four_bit
from deepseek_kernels.gpu.four_bit_dequantize import dense
from deepseek_kernels.gpu.four_bit_experts import BY_ROWS, DECODING
from deepseek_kernels.gpu.four_bit_products import four_bit_gemm
from deepseek_kernels.gpu.routing_metadata import routing_metadata

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
H, I, E, K = 2048, 768, 16, 4  # noqa: E741
FORMS = [("int4", 128), ("int4", 32), ("nf4", 64)]
# Tokens, so that an expert has a row, four, fifty and a thousand on average: each set of tiles, and dense copies.
TOKENS = [3, 16, 200, 4000]


def make(name, group, T, *, dtype=torch.bfloat16, hidden=H, width=I):
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)

    fmt = FourBitFormat.of(4, name, group)
    stacks = [normal(E, 2 * width, hidden) / hidden**0.5, normal(E, hidden, width) / width**0.5]
    ids = torch.randint(0, E + 1, (T, K), generator=generator, device=DEVICE)
    ids[ids == 1] = E  # an expert without rows, and unused slots
    weights = torch.rand(T, K, generator=generator, device=DEVICE)
    return [normal(T, hidden), *(pack(stack, fmt) for stack in stacks), ids, weights]


def step(case):
    """Output, gradients of the input and of the router weights."""
    leaves = [case[i].detach().requires_grad_() for i in (0, 4)]
    output = fused_moe_four_bit(leaves[0], *case[1:4], leaves[1])
    return [output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "group"), FORMS)
def test_a_product_with_the_identity_gives_every_weight_bit_for_bit(name, group, dtype):
    """Every code and every scale through the inner loop, with each set of tiles."""
    width = 256
    stack = torch.randn(2, 512, width, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE).to(dtype)
    packed = pack(stack, FourBitFormat.of(4, name, group))
    assert torch.equal(dense(packed), unpacked(packed))
    ids = torch.arange(2, device=DEVICE).repeat_interleave(width).unsqueeze(1)
    identity = torch.eye(width, device=DEVICE, dtype=dtype).repeat(2, 1)
    for tiles in (DECODING, *BY_ROWS[name]):
        metadata = routing_metadata(ids, 2, tiles.block_m)
        got = four_bit_gemm(identity, packed, metadata, tiles.down)
        assert torch.equal(got.view(2, width, -1).mT, unpacked(packed)), tiles


@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize(("name", "group"), FORMS)
def test_every_tile(name, group, T):
    case = make(name, group, T)
    stacks = [unpacked(one) for one in case[1:3]]
    ones = torch.ones_like(case[0])
    wanted = expert_loop(case[0], *stacks, *case[3:], grad_output=ones)
    for got, other in zip(step(case), (wanted[0], wanted[1], wanted[4]), strict=True):
        assert largest_tile_error(got, other) <= TILE_TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("T", [3, 40, 4000])
def test_sizes_that_no_tile_divides(T):
    case = make("int4", 32, T, hidden=352, width=224)
    wanted = fused_moe(case[0], *(unpacked(one) for one in case[1:3]), *case[3:])
    assert largest_tile_error(step(case)[0], wanted) <= TILE_TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize("name", ["int4", "nf4"])
def test_twenty_runs_are_bit_equal_and_as_without_gradients(name, T):
    case = make(name, 64, T)
    first = step(case)
    for _ in range(19):
        assert all(torch.equal(*pair) for pair in zip(step(case), first, strict=True))
    assert torch.equal(fused_moe_four_bit(*case), first[0])


@pytest.mark.parametrize("T", [1, 16])
def test_no_question_to_the_host_and_a_cuda_graph(T):
    case = make("nf4", 64, T)
    wanted = step(case)[0]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fused_moe_four_bit(*case)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, wanted)


@pytest.mark.parametrize(("name", "group"), [("int4", 128), ("nf4", 64)])
def test_weights_take_055_bytes_and_one_projection_at_a_time_is_dense(name, group):
    case = make(name, group, 4000)
    packed = case[1:3]
    num_bytes = sum(t.numel() * t.element_size() for one in packed for t in (one.codes, one.scales))
    assert num_bytes <= 0.55 * 3 * E * I * H
    stacks = [unpacked(one) for one in packed]

    def peak(layer, weights):
        x = case[0].detach().requires_grad_()
        torch.autograd.grad(layer(x, *weights, *case[3:]).sum(), x)  # compiled from here on
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(layer(x, *weights, *case[3:]).sum(), x)
        return torch.cuda.max_memory_allocated() - before

    largest = 2 * E * 2 * I * H
    assert peak(fused_moe_four_bit, packed) <= peak(fused_moe, stacks) + largest + 2**20
    few = make(name, group, 40)
    operands = few[:3], few[3:]
    fused_moe_four_bit(*operands[0], *operands[1])
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fused_moe_four_bit(*operands[0], *operands[1])
    assert torch.cuda.max_memory_allocated() - before <= largest / 8, "few rows make no copy"


def test_a_model_moved_to_the_gpu():
    """Quantized on the CPU, moved without anything dense, and run there; then the same on the weights read back."""
    modeling = pytest.importorskip("modeling_deepseek")
    config = modeling.DeepseekConfig.from_preset("debug", vocab_size=61)
    model = modeling.quantize_experts(modeling.DeepseekForCausalLM(config).to(torch.bfloat16)).to(DEVICE)
    ids = torch.arange(48, device=DEVICE).view(2, 24)
    with torch.no_grad():
        got = model(input_ids=ids).logits
        wanted = modeling.dequantize_experts(model)(input_ids=ids).logits
    assert (got - wanted).float().norm() <= 2e-2 * wanted.float().norm()
