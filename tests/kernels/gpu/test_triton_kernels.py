"""Each Triton kernel, run: under Triton's interpreter on a CPU, or on the GPU where there is one.

Without a GPU these need a process started with TRITON_INTERPRET=1; ``test_in_interpreter.py`` starts it. Shapes are
small because the interpreter takes milliseconds a step, and odd because tiles are 16: H and I straddle one.
"""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from moe_cases import RMS, in_float64, make_case, make_ids  # noqa: E402

from deepseek_kernels.fused_moe import fused_moe, fused_moe_reference  # noqa: E402
from deepseek_kernels.gpu import combine as combine_file  # noqa: E402
from deepseek_kernels.gpu import down_backward as down_backward_file  # noqa: E402
from deepseek_kernels.gpu import gate_up as gate_up_file  # noqa: E402
from deepseek_kernels.gpu import grouped_gemm as grouped_gemm_file  # noqa: E402
from deepseek_kernels.gpu import routing_metadata as routing_metadata_file  # noqa: E402
from deepseek_kernels.gpu import weight_gradient as weight_gradient_file  # noqa: E402
from deepseek_kernels.gpu.routing_metadata import routing_metadata, routing_metadata_reference  # noqa: E402
from deepseek_kernels.gpu.tiles import INTERPRETED, SAFE  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILES = SAFE if DEVICE == "cuda" else INTERPRETED
PATTERNS = ["some_unused", "empty_experts", "one_expert", "all_unused"]
# H and I off the tile of 16 on either side; I = 5 below one tile.
ODD = {"H": 35, "I": 19}
pytestmark = pytest.mark.usefixtures("guarded_buffers")


@pytest.mark.parametrize("T,K,E,block_m", [(0, 2, 3, 16), (1, 1, 1, 16), (7, 3, 5, 4), (200, 3, 6, 16)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_metadata_equals_a_stable_sort(T, K, E, block_m, pattern):
    ids = make_ids(pattern, T, K, E, torch.Generator().manual_seed(T)).long().to(DEVICE)
    got = routing_metadata(ids, E, block_m)
    want = routing_metadata_reference(ids, E, block_m)
    used = int(want.expert_start[-1])
    assert torch.equal(got.row_slot[:used], want.row_slot[:used])
    for name in ("slot_row", "expert_start", "tile_start"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


# Three chunks of 1024 slots, and two of 8192 where there are many.
@pytest.mark.parametrize(("T", "few"), [(700, 2**19), (2800, 0)])
def test_metadata_of_several_chunks_equals_a_stable_sort(monkeypatch, T, few):
    monkeypatch.setattr(routing_metadata_file, "_MANY_SLOTS", few)
    test_metadata_equals_a_stable_sort(T, 3, 6, 16, "some_unused")


def test_metadata_treats_negative_ids_as_unused():
    ids = torch.tensor([[0, -1], [-(2**40), 1]], device=DEVICE)
    assert routing_metadata(ids, 2, 16).slot_row.tolist() == [0, -1, -1, 1]


def rows_of(case):
    """Metadata and, per used row, its token, expert and router weight."""
    ids, weights = case[3], case[4].detach()
    metadata = routing_metadata(ids, case[1].shape[0], TILES.block_m)
    slots = metadata.row_slot[: int(metadata.expert_start[-1])].long()
    return metadata, slots // ids.shape[1], ids.reshape(-1)[slots], weights.reshape(-1)[slots]


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gate_up(activation):
    case = [t.detach() for t in make_case(torch.float64, T=9, **ODD, device=DEVICE)]
    metadata, tokens, experts, _ = rows_of(case)
    got = gate_up_file.gate_up(case[0], case[1], metadata, 3, activation, True, TILES.gate_up)
    want = gate_up_file.gate_up_reference(case[0], case[1], tokens, experts, activation)
    for one, other in zip(got, want, strict=True):
        close(one[: len(tokens)], other)


@pytest.mark.parametrize("transpose", [True, False])
def test_grouped_gemm(transpose):
    case = [t.detach() for t in make_case(torch.float64, T=9, **ODD, device=DEVICE)]
    metadata, tokens, experts, _ = rows_of(case)
    weights = case[2] if transpose else case[1]
    rows = torch.randn(case[3].numel(), weights.shape[2 if transpose else 1], dtype=torch.float64, device=DEVICE)
    got = grouped_gemm_file.grouped_gemm(rows, weights, metadata, TILES.down, transpose=transpose)
    want = grouped_gemm_file.grouped_gemm_reference(rows[: len(tokens)], weights, experts, transpose=transpose)
    close(got[: len(tokens)], want)


@pytest.mark.parametrize("weighted", [True, False])
def test_combine(weighted):
    case = make_case(torch.float64, T=9, **ODD, device=DEVICE)
    metadata = rows_of(case)[0]
    rows = torch.randn(case[3].numel(), 35, dtype=torch.float64, device=DEVICE)
    weights = case[4].detach() if weighted else None
    got = combine_file.combine(rows, metadata.slot_row, 3, weights)
    close(got, combine_file.combine_reference(rows, metadata.slot_row, 3, weights))


def test_combine_ignores_weights_of_unused_slots():
    slot_row = torch.tensor([0, -1], dtype=torch.int32, device=DEVICE)
    weights = torch.tensor([[2.0, float("nan")]], dtype=torch.float64, device=DEVICE)
    rows = torch.ones(2, 3, dtype=torch.float64, device=DEVICE)
    assert combine_file.combine(rows, slot_row, 2, weights).tolist() == [[2.0] * 3]


@pytest.mark.parametrize("parts", [1, 4, 6, 11])
@pytest.mark.parametrize("has_rows", [True, False])
def test_combine_gradients(parts, has_rows):
    case = make_case(torch.float64, T=9, **ODD, device=DEVICE)
    slot_row = rows_of(case)[0].slot_row
    rows = torch.randn(27, 35, dtype=torch.float64, device=DEVICE) if has_rows else None
    partial = torch.randn(parts, 27, dtype=torch.float64, device=DEVICE)
    grad_x, grad_weights = combine_file.combine_gradients(rows, slot_row, case[4].detach(), partial)
    wanted = torch.where(slot_row >= 0, partial.sum(0)[slot_row.clamp(min=0)], 0)
    close(grad_weights, wanted.view(9, 3))
    assert (grad_x is None) == (rows is None)
    if has_rows:
        close(grad_x, combine_file.combine_reference(rows, slot_row, 3))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_down_backward(activation):
    # I = 37: two column blocks of 32, so that partial sums of the router's gradient are added up.
    case = [t.detach() for t in make_case(torch.float64, T=9, H=19, I=37, device=DEVICE)]
    metadata, tokens, experts, row_weights = rows_of(case)
    grad = torch.randn_like(case[0])
    h = torch.randn(case[3].numel(), 74, dtype=torch.float64, device=DEVICE)
    tile = TILES.down_backward
    *got, parts = down_backward_file.down_backward(grad, case[2], h, case[4], metadata, activation, tile)
    got.append(parts.sum(0))
    want = down_backward_file.down_backward_reference(
        grad, case[2], h[: len(tokens)], row_weights, tokens, experts, activation
    )
    for one, other in zip(got, want, strict=True):
        close(one[: len(tokens)], other)


@pytest.mark.parametrize("gather", ["left", "right"])
def test_weight_gradient(gather):
    case = make_case(torch.float64, T=9, **ODD, pattern="empty_experts", device=DEVICE)
    metadata, tokens, experts, _ = rows_of(case)
    by_token = torch.randn(9, 35, dtype=torch.float64, device=DEVICE)
    by_row = torch.randn(27, 19, dtype=torch.float64, device=DEVICE)
    left, right = (by_token, by_row) if gather == "left" else (by_row, by_token)
    got = weight_gradient_file.weight_gradient(left, right, metadata, 3, TILES.weight_gradient, gather=gather)
    left, right = (left[tokens], right) if gather == "left" else (left, right[tokens])
    close(got, weight_gradient_file.weight_gradient_reference(left, right, experts, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("K", [1, 5])
def test_decoding_equals_slot_after_slot_bit_for_bit(dtype, K):
    x, gate_up, down, ids, weights = (t.detach() for t in make_case(dtype, T=2, H=40, I=19, K=K, device=DEVICE))
    one, alone = torch.ones(1, 1, device=DEVICE), []
    for token, k in ((t, k) for t in range(2) for k in range(K)):
        alone.append(fused_moe(x[token : token + 1], gate_up, down, ids[token : token + 1, k : k + 1], one))
    slot_row = torch.where(ids.flatten() < 6, torch.arange(2 * K, device=DEVICE), -1).int()
    wanted = combine_file.combine(torch.cat(alone), slot_row, K, weights)
    assert torch.equal(fused_moe(x, gate_up, down, ids, weights), wanted)


@pytest.mark.parametrize("T,H,dtype", [(0, 20, torch.float32), (1, 260, torch.float32), (4, 20, torch.bfloat16)])
def test_decode(T, H, dtype):
    # H = 260 takes two steps of 256; I = 19 is above one block of 16.
    case = make_case(dtype, T=T, H=H, I=19, device=DEVICE)
    with torch.no_grad():
        output = fused_moe(*case)
    wanted = fused_moe_reference(*in_float64(case))
    assert (output.cpu() - wanted).abs().max().item() <= 4 * RMS[dtype] * wanted.abs().max().item() if T else True
