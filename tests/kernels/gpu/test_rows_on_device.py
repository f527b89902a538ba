"""One expert per token, fewer rows than slots, and experts split over processes: on a GPU, with its own tiles."""

import functools

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from lora_cases import loop_reference, make_lora_case, names_of, step
from moe_cases import assert_tiles_equal_reference, gradients, make_case

from deepseek_kernels.expert_loop import TILE_TOLERANCE, expert_loop, largest_tile_error
from deepseek_kernels.expert_parallel import exchange_experts
from deepseek_kernels.fused_moe import fused_moe
from deepseek_kernels.gpu import experts as experts_gpu

pytestmark = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LEAVES = (0, 1, 2, 4)
E = 8


def case_of(dtype=BF16, *, T=1500, H=512, I=256, K=1, **settings):  # noqa: E741
    return make_case(dtype, T=T, H=H, I=I, E=E, K=K, device="cuda", **settings)


def bounded(case, extra=0):
    """`fused_moe` with as many rows as slots are used, and some more."""
    return functools.partial(fused_moe, max_rows=int((case[3] < E).sum()) + extra)


def again(function, case):
    for i in LEAVES:
        case[i].grad = None
    return [t.clone() for t in gradients(function, case)]


@pytest.fixture
def no_combine(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("combine was launched")

    monkeypatch.setattr(experts_gpu, "combine", refuse)


# The tile's multiple, and neighbors that load in other widths: by 8, and by 1; T below 64 and 16 rows per expert.
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("H", "I"), [(512, 256), (520, 264), (511, 257)])
@pytest.mark.parametrize("T", [5, 100, 400, 6000])
def test_one_expert_per_token(T, H, I, dtype, no_combine):  # noqa: E741
    assert_tiles_equal_reference(fused_moe, case_of(dtype, T=T, H=H, I=I), dtype)


@pytest.mark.parametrize("pattern", ["any", "empty_experts", "one_expert", "skewed", "all_unused"])
@pytest.mark.parametrize("K", [1, 3])
def test_patterns(pattern, K):
    for extra in (0, 5):
        case = case_of(K=K, pattern=pattern)
        assert_tiles_equal_reference(bounded(case, extra), case, BF16)
    if K == 1:
        assert_tiles_equal_reference(fused_moe, case_of(pattern=pattern), BF16)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("H", "I"), [(512, 256), (511, 257)])
@pytest.mark.parametrize(("T", "K"), [(3, 1), (40, 3), (6000, 3), (6000, 1)])
def test_fewer_rows_than_slots(T, K, H, I, dtype):  # noqa: E741
    case = case_of(dtype, T=T, H=H, I=I, K=K)
    assert_tiles_equal_reference(bounded(case), case, dtype)


@pytest.mark.parametrize("K", [1, 3])
def test_fewer_rows_under_adapters(K):
    """All gradients block by block; B's expert by expert, as in ``test_lora_on_device.py``."""
    case = make_lora_case(BF16, T=1500, H=512, I=256, E=E, K=K, r=16, device="cuda")
    case["max_rows"] = int((case["ids"] < E).sum())
    for name, one, other in zip(names_of(case), step(case), loop_reference(case), strict=True):
        if name.endswith("_b"):
            one, other = (t.view(t.shape[0], -1, E).permute(2, 0, 1) for t in (one, other))
        assert largest_tile_error(one, other) <= TILE_TOLERANCE[BF16], name


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_activations(activation):
    assert_tiles_equal_reference(fused_moe, case_of(), BF16, activation)


@pytest.mark.parametrize("K", [1, 3])
def test_tokens_without_a_row_are_nan_and_no_others(K):
    case = case_of(K=K)
    few = functools.partial(fused_moe, max_rows=int((case[3] < E).sum()) - 100)
    whole, output = fused_moe(*case).detach(), few(*case).detach()
    is_lost = output.isnan().any(1)
    assert 1 <= is_lost.sum() <= 100 and torch.equal(is_lost, output.isnan().all(1))
    assert largest_tile_error(output[~is_lost], whole[~is_lost]) <= TILE_TOLERANCE[BF16]


@pytest.mark.parametrize("is_bounded", [False, True])
@pytest.mark.parametrize("K", [1, 3])
def test_twenty_runs_are_bit_equal(K, is_bounded):
    case = case_of(T=6000, H=1024, I=768, K=K)
    function = bounded(case) if is_bounded else fused_moe
    first = again(function, case)
    for _ in range(19):
        assert all(torch.equal(one, wanted) for one, wanted in zip(again(function, case), first, strict=True))


@pytest.mark.parametrize("K", [1, 3])
def test_nothing_waits_and_a_graph_repeats_it(K):
    case, fresh = case_of(K=K), case_of(K=K, seed=1)
    leaves, grad = [case[i] for i in LEAVES], torch.randn_like(case[0])

    def step():
        output = fused_moe(*case, max_rows=975 * K)
        return output, *torch.autograd.grad(output, leaves, grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    mode = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor, other in zip(case, fresh, strict=True):
            tensor.copy_(other)
    graph.replay()
    for one, other in zip(captured, step(), strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A group of this process alone."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def exchanged(group, x, gate_up, down, ids, weights, activation="silu"):
    def experts(rows, local, row_weights):
        return fused_moe(rows, gate_up, down, local, row_weights, activation=activation)

    return exchange_experts(x, ids, weights, experts, E, group)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(("T", "K"), [(7, 1), (1500, 1), (1500, 3), (6000, 3)])
def test_the_exchange_on_one_device(group, T, K, dtype):
    assert_tiles_equal_reference(functools.partial(exchanged, group), case_of(dtype, T=T, K=K), dtype)


@pytest.mark.parametrize("pattern", ["all_unused", "one_expert", "empty_experts"])
def test_the_exchange_of_uneven_batches(group, pattern):
    assert_tiles_equal_reference(functools.partial(exchanged, group), case_of(K=3, pattern=pattern), BF16)


def test_the_exchange_repeats_bit_by_bit(group):
    case, call = case_of(T=6000, K=3), functools.partial(exchanged, group)
    first = again(call, case)
    for _ in range(5):
        assert all(torch.equal(one, wanted) for one, wanted in zip(again(call, case), first, strict=True))


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_shares_of_the_experts_add_up(dtype):
    """What two devices that share a batch compute, one after the other, each in buffers of its own rows."""
    x, gate_up, down, ids, weights = (t.detach() for t in case_of(dtype, T=3000, K=3))
    half, total = E // 2, 0
    for first in (0, half):
        is_own = (ids >= first) & (ids < first + half)
        local = torch.where(is_own, ids - first, half)
        share = slice(first, first + half)
        total += fused_moe(
            x, gate_up[share].contiguous(), down[share].contiguous(), local, weights, max_rows=int(is_own.sum())
        ).float()
    wanted = expert_loop(x, gate_up, down, ids, weights, dtype=torch.float64)[0]
    assert largest_tile_error(total.to(dtype), wanted) <= TILE_TOLERANCE[dtype]
