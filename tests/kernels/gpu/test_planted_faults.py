"""Faults put into the kernels' source, each of which the comparison tile by tile has to see.

A check that passes is worth what it would have caught. Every fault changes one line of a kernel as a slip of the pen
or a compiler could: it computes a tile wrongly, and nothing crashes or becomes NaN.
"""

import dataclasses
import importlib.util
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from moe_cases import make_case, runs_descriptors, tile_errors

from deepseek_kernels.expert_loop import TILE_TOLERANCE, largest_tile_error
from deepseek_kernels.fused_moe import fused_moe
from deepseek_kernels.gpu import experts as fused_moe_gpu
from deepseek_kernels.gpu.tiles import ROW_KERNELS, SHIPPED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Name: file and function, what stands there, what is put in its place.
FAULTS = {
    "a_zero_tile": (
        "grouped_gemm",
        "narrow(output, DTYPE)",
        "narrow(output * tl.where((block_n == 1) & (expert == 1), 0.0, 1.0), DTYPE)",
    ),
    "another_experts_tile": (
        "gate_up",
        "weight_rows = expert * 2 * WIDTH",
        "weight_rows = (expert ^ (block_n == 1)) * 2 * WIDTH",
    ),
    "another_experts_block": (
        "gate_up",
        "load_block(weight_ptr, expert, first_column, k",
        "load_block(weight_ptr, expert ^ (block_n == 1), first_column, k",
    ),
    "the_first_block_again": (
        "down_backward",
        "load_block(weight_ptr, expert, k, block_n * BLOCK_N",
        "load_block(weight_ptr, expert, k, block_n * 0",
    ),
    "rows_of_the_tile_before": (
        "grouped_gemm",
        "load_block(rows_ptr, expert * 0, first.to(tl.int32)",
        "load_block(rows_ptr, expert * 0, first.to(tl.int32) // 256 * 128",
    ),
    "a_neighbors_tile": ("weight_gradient", "ms % M", "(ms + BLOCK_M * (block_m == 0)) % M"),
    "a_swapped_scale": (
        "combine",
        "tl.load(weights_ptr + token * SLOTS + k)",
        "tl.load(weights_ptr + token * SLOTS + 1 - k)",
    ),
    "a_swapped_scale_backward": ("down_backward", "topk_weights_ptr + slots", "topk_weights_ptr + (slots ^ 1)"),
    "a_lost_step": ("gate_up", "range(0, HIDDEN, BLOCK_K)", "range(0, HIDDEN - BLOCK_K, BLOCK_K)"),
    "a_lost_step_backward": ("down_backward", "range(0, HIDDEN, BLOCK_K)", "range(BLOCK_K, HIDDEN, BLOCK_K)"),
    "a_lost_step_of_rows": ("weight_gradient", "range(0, count, BLOCK_K)", "range(0, count - BLOCK_K, BLOCK_K)"),
    "an_unmasked_tail_of_rows": ("weight_gradient", "is_row = rows < count", "is_row = rows < count + 1"),
    "an_unmasked_tail_of_columns": (
        "grouped_gemm",
        "is_inner = inner < INNER - k",
        "is_inner = inner < INNER - k + 1",
    ),
    "a_lost_partial_sum": (
        "down_backward",
        "block_n.to(tl.int64) * num_rows",
        "(block_n * 0).to(tl.int64) * num_rows",
    ),
    "gate_and_up_swapped": ("down_backward", "through_clamp(grad_a * activated,", "through_clamp(grad_a * up,"),
}
QUICK = ["a_zero_tile"]
# In the lines that run where the weights come by pointer.
BY_POINTER = ["another_experts_tile", "an_unmasked_tail_of_columns"]
pytestmark = pytest.mark.usefixtures("guarded_buffers")


def use_production_tiles(monkeypatch, *, by_descriptor):
    def choose(device, hidden, width, bucket, dtype):
        tiles = SHIPPED["sm_90", 0, 0, bucket].for_dtype(dtype)
        rows = {n: dataclasses.replace(getattr(tiles, n), uses_descriptor=by_descriptor) for n in ROW_KERNELS}
        return dataclasses.replace(tiles, **rows)

    monkeypatch.setattr(fused_moe_gpu, "choose_tiles", choose)


def case_of_two_experts():
    """Each expert's last row weighs as much as any: counted twice, it must show among some 140."""
    case = make_case(torch.bfloat16, T=140, H=264, I=136, E=2, K=2, pattern="any", device=DEVICE)
    with torch.no_grad():
        case[3][-1] = torch.tensor([0, 1])
        case[4][-1] = 2.0
    return case


def source_of(file):
    return Path(fused_moe_gpu.__file__).with_name(f"{file}.py").read_text()


def test_the_lines_to_break_are_there():
    """The faults themselves are planted in the slow run only."""
    assert [name for name, (file, old, _) in FAULTS.items() if old not in source_of(file)] == []


def plant(name, folder, monkeypatch):
    """Put a copy of the kernel's file with the fault in place of the kernel."""
    file, old, new = FAULTS[name]
    source = source_of(file)
    assert old in source, f"{name}: the line to break is not there any more"
    path = folder / f"{name}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"planted_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(fused_moe_gpu, file, getattr(module, file))


@pytest.mark.slow
def test_the_case_without_a_fault_is_right(monkeypatch):
    use_production_tiles(monkeypatch, by_descriptor=runs_descriptors())
    errors = tile_errors(fused_moe, case_of_two_experts())
    assert max(errors.values()) < TILE_TOLERANCE[torch.bfloat16], errors


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAULTS])
def test_a_planted_fault_is_seen(name, tmp_path, monkeypatch):
    use_production_tiles(monkeypatch, by_descriptor=name not in BY_POINTER and runs_descriptors())
    plant(name, tmp_path, monkeypatch)
    errors = tile_errors(fused_moe, case_of_two_experts())
    assert max(errors.values()) > 4 * TILE_TOLERANCE[torch.bfloat16], errors


def test_one_wrong_tile_of_thousands_is_seen():
    """What one norm over the whole tensor lets pass: 1.3 to 2.6 % of it."""
    wanted = torch.randn(5, 16 * 128, 16 * 128, generator=torch.Generator().manual_seed(0))
    noise = 1 + 4e-3 * torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    assert largest_tile_error(wanted * noise, wanted) < TILE_TOLERANCE[torch.bfloat16] / 2
    for place in (slice(0, 128), slice(256, 384)):
        broken = wanted.clone()
        broken[3, place, 128:256] = 0
        assert (broken - wanted).norm() < 0.03 * wanted.norm()
        assert largest_tile_error(broken, wanted) > 0.9
        broken[3, place, 128:256] = wanted[3, place, :128]
        assert largest_tile_error(broken, wanted) > 0.9
    broken[3, 0, 0] = float("nan")
    assert largest_tile_error(broken, wanted) == float("inf")
    assert largest_tile_error(torch.ones(1, 3), torch.zeros(1, 3)) == float("inf")
