"""What only a GPU can show: repeatability, CUDA graphs, inductor, sizes above 2^31, TF32."""

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from moe_cases import gradients, make_case

from deepseek_kernels.expert_loop import TILE_TOLERANCE, expert_loop, largest_tile_error
from deepseek_kernels.fused_moe import fused_moe
from deepseek_kernels.gpu import launch
from deepseek_kernels.gpu.combine import combine_gradients
from deepseek_kernels.gpu.routing_metadata import routing_metadata, routing_metadata_reference

pytestmark = pytest.mark.gpu
LEAVES = (0, 1, 2, 4)


def case_of(dtype=torch.bfloat16, *, T=1500, H=512, I=256, E=8, K=3, **settings):  # noqa: E741
    return make_case(dtype, T=T, H=H, I=I, E=E, K=K, device="cuda", **settings)


@pytest.mark.parametrize("T", [1, 4, 5, 100, 1500])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_forward_pass_is_the_same_with_gradients_and_without(dtype, T):
    case = case_of(dtype, T=T)
    with torch.no_grad():
        alone = fused_moe(*case)
    assert torch.equal(fused_moe(*case).detach(), alone)


@pytest.mark.parametrize("is_disturbed", [False, True])
@pytest.mark.parametrize("T", [1500, 6000])
def test_twenty_runs_are_bit_equal(T, is_disturbed):
    """Also while another stream keeps the multiprocessors and the caches busy."""
    first, other, stream = None, torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    case = case_of(T=T, H=1024, I=768)
    for _ in range(20):
        if is_disturbed:
            with torch.cuda.stream(stream):
                torch.mm(other, other)
        for i in LEAVES:
            case[i].grad = None
        results = gradients(fused_moe, case)
        first = first or [t.clone() for t in results]
        assert all(torch.equal(one, wanted) for one, wanted in zip(results, first, strict=True))
    torch.cuda.synchronize()


@pytest.mark.parametrize("T", [3, 100, 1500])
def test_a_training_step_in_a_cuda_graph(T):
    case, fresh = case_of(T=T), case_of(T=T, seed=1)
    leaves = [case[i] for i in LEAVES]
    grad = torch.randn_like(case[0])

    def step():
        output = fused_moe(*case)
        return output, *torch.autograd.grad(output, leaves, grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor, other in zip(case, fresh, strict=True):
            tensor.copy_(other)
    graph.replay()
    wanted = step()
    assert all(torch.equal(one, other) for one, other in zip(captured, wanted, strict=True))


def test_decoding_in_a_cuda_graph():
    case, fresh = ([t.detach() for t in case_of(T=2, seed=seed)] for seed in (0, 1))
    fused_moe(*case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fused_moe(*case)
    for tensor, other in zip(case, fresh, strict=True):
        tensor.copy_(other)
    graph.replay()
    assert torch.equal(captured, fused_moe(*fresh))


@pytest.mark.parametrize("T", [3, 100, 1500])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_launching_again_gives_what_triton_launches(monkeypatch, dtype, T):
    """Also for operands off 16 bytes, and for router weights of another type than before."""
    for offset, router in ((0, torch.float32), (0, torch.bfloat16), (1, torch.float32)):
        results = []
        for by_triton in (True, False, False):
            case = case_of(dtype, T=T)
            case[4] = case[4].detach().to(router).requires_grad_()
            room = torch.empty(case[0].numel() + 8, dtype=dtype, device="cuda")[offset : offset + case[0].numel()]
            case[0] = room.view(case[0].shape).copy_(case[0].detach()).requires_grad_()
            monkeypatch.setattr(launch, "is_left_to_triton", by_triton)
            results.append(gradients(fused_moe, case))
        for again in results[1:]:
            assert all(torch.equal(one, other) for one, other in zip(again, results[0], strict=True))


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 6, 8, 11, 24])
@pytest.mark.parametrize("T", [5, 3000])
def test_partial_sums_are_added_in_torchs_order(parts, T):
    """So that the router's gradient keeps the bits it had when torch added them."""
    partial = torch.randn(parts, T * 4, device="cuda")
    slot_row = torch.randperm(T * 4, device="cuda").int()
    got = combine_gradients(None, slot_row, torch.empty(T, 4, device="cuda"), partial)[1]
    assert torch.equal(got, partial.sum(0)[slot_row.long()].view(T, 4))


@pytest.mark.parametrize(("T", "K", "E"), [(128, 8, 128), (129, 8, 128), (5000, 12, 384), (100_000, 8, 128)])
def test_many_slots_are_sorted_stably(T, K, E):
    ids = torch.randint(0, E + 2, (T, K), device="cuda")
    got, wanted = routing_metadata(ids, E, 128), routing_metadata_reference(ids.clamp(max=E), E, 128)
    used = int(wanted.expert_start[-1])
    assert torch.equal(got.row_slot[:used], wanted.row_slot[:used])
    for name in ("slot_row", "expert_start", "tile_start"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name


def test_inductor():
    compiled = torch.compile(lambda *t: fused_moe(*t) * 2 + 1, fullgraph=True)
    case, plain = case_of(), case_of()
    grad = torch.randn_like(case[0])
    one, other = compiled(*case), fused_moe(*plain) * 2 + 1
    one.backward(grad)
    other.backward(grad)
    assert largest_tile_error(one.detach(), other.detach()) < 1e-2
    for i in LEAVES:
        assert largest_tile_error(case[i].grad, plain[i].grad) < 1e-2


# h of more than 2^31 elements, y of more, and weights of more: 2^31 is where 32-bit offsets end.
@pytest.mark.xdist_group("large")
@pytest.mark.parametrize(
    "T,H,I,E,K",
    [(66000, 128, 2048, 8, 8), (66000, 4096, 64, 8, 8), (512, 4352, 2048, 128, 2)],
    ids=["preactivation", "rows", "weights"],
)
def test_more_elements_than_fit_32_bits(T, H, I, E, K):  # noqa: E741
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    x, gate_up, down = normal(T, H), normal(E, 2 * I, H) / H**0.5, normal(E, H, I) / I**0.5
    ids = torch.randint(0, E, (T, K), generator=generator, device="cuda")
    weights, grad = torch.rand(T, K, generator=generator, device="cuda"), normal(T, H)
    assert max(T * K * 2 * I, T * K * H, E * 2 * I * H) > 2**31
    operands = [t.requires_grad_() for t in (x, gate_up, down)]
    output = fused_moe(*operands, ids, weights.requires_grad_())
    got = [output.detach(), *torch.autograd.grad(output, [*operands, weights], grad)]
    wanted = expert_loop(x, gate_up, down, ids, weights, grad_output=grad)
    for one, other in zip(got, wanted, strict=True):
        assert largest_tile_error(one, other) <= TILE_TOLERANCE[torch.bfloat16]
    del output, got, wanted, one, other
    torch.cuda.empty_cache()


def test_tf32_is_taken_where_torch_may_take_it():
    case = [t.detach() for t in case_of(torch.float32)]
    wanted = expert_loop(*case, dtype=torch.float64)[0]
    exact = largest_tile_error(fused_moe(*case), wanted)
    try:
        torch.backends.fp32_precision = "tf32"
        fast = largest_tile_error(fused_moe(*case), wanted)
    finally:
        torch.backends.fp32_precision = "none"
    assert exact <= TILE_TOLERANCE[torch.float32] < fast < 3e-3
    assert largest_tile_error(fused_moe(*case), wanted) == exact


def test_inputs_on_another_stream_and_of_no_tokens():
    with torch.cuda.stream(torch.cuda.Stream()):
        case = case_of(T=300)
        got = gradients(fused_moe, case)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, gradients(fused_moe, case_of(T=300)), strict=True))
    empty = gradients(fused_moe, case_of(T=0))
    assert empty[0].shape == (0, 512) and not empty[2].any() and not empty[3].any()
