"""Clamps, alpha, shift, interleaved weights and biases in the Triton kernels: each kernel, and the layer.

Like ``test_triton_kernels.py`` these run on a GPU, or in a process started with TRITON_INTERPRET=1, which
``test_in_interpreter.py`` starts.
"""

import dataclasses
import os

import pytest
import torch

pytest.importorskip("triton")
if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from epilogue_cases import EPILOGUES, assert_equals_reference, biased_case
from moe_cases import runs_descriptors

from deepseek_kernels.fused_moe import fused_moe
from deepseek_kernels.gpu import down_backward as down_backward_file
from deepseek_kernels.gpu import gate_up as gate_up_file
from deepseek_kernels.gpu.routing_metadata import routing_metadata
from deepseek_kernels.gpu.row_sums import row_sums, row_sums_reference
from deepseek_kernels.gpu.tiles import INTERPRETED, SAFE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILES = SAFE if DEVICE == "cuda" else INTERPRETED
# The interpreter takes seconds a layer: by default one that is clamped, and one with everything.
NAMES = [
    name if name in ("deepseek_v4", "gpt_oss") else pytest.param(name, marks=pytest.mark.slow) for name in EPILOGUES
]
pytestmark = pytest.mark.usefixtures("guarded_buffers")


def detached_case(**shape):
    """x, gate_up, down, ids, weights and both biases; metadata; token, expert and weight of each used row."""
    case = [t.detach() for t in biased_case(torch.float64, device=DEVICE, **shape)]
    ids, weights = case[3], case[4]
    metadata = routing_metadata(ids, case[1].shape[0], TILES.block_m)
    slots = metadata.row_slot[: int(metadata.expert_start[-1])].long()
    return case, metadata, (slots // ids.shape[1], ids.reshape(-1)[slots], weights.reshape(-1)[slots])


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("by_descriptor", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_gate_up(name, by_descriptor):
    if by_descriptor and not runs_descriptors():
        pytest.skip("no copy engine")
    # H = 34 takes three steps of 16, the last of two: a gate's row ends where its up begins.
    (x, gate_up, _, _, _, bias, _), metadata, (tokens, experts, _) = detached_case(T=9, H=34, I=19)
    tile = dataclasses.replace(TILES.gate_up, uses_descriptor=by_descriptor)
    form = EPILOGUES[name].text
    got = gate_up_file.gate_up(x, gate_up, metadata, 3, form, True, tile, bias)
    want = gate_up_file.gate_up_reference(x, gate_up, tokens, experts, form, bias)
    for one, other in zip(got, want, strict=True):
        close(one[: len(tokens)], other)


@pytest.mark.parametrize("name", NAMES)
def test_down_backward(name):
    case, metadata, (tokens, experts, row_weights) = detached_case(T=9, H=19, I=37)
    grad, h = torch.randn_like(case[0]), torch.randn(27, 74, dtype=torch.float64, device=DEVICE)
    form = EPILOGUES[name].text
    *got, parts = down_backward_file.down_backward(grad, case[2], h, case[4], metadata, form, TILES.down_backward)
    got.append(parts.sum(0))
    want = down_backward_file.down_backward_reference(
        grad, case[2], h[: len(tokens)], row_weights, tokens, experts, form
    )
    for one, other in zip(got, want, strict=True):
        close(one[: len(tokens)], other)


@pytest.mark.parametrize("pattern", ["empty_experts", "one_expert", "all_unused"])
def test_row_sums(pattern):
    _, metadata, (_, experts, _) = detached_case(T=9, pattern=pattern)
    rows = torch.randn(27, 35, dtype=torch.float64, device=DEVICE)
    close(row_sums(rows, metadata), row_sums_reference(rows[: len(experts)], experts, 6))


@pytest.mark.parametrize("T", [3, 7])  # three tokens are decoded
@pytest.mark.parametrize("name", NAMES)
def test_layer(name, T):
    case = biased_case(torch.float64, T=T, H=17, I=9, E=4, device=DEVICE)
    assert_equals_reference(case, EPILOGUES[name], torch.float64)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(t, marks=pytest.mark.slow) for t in (torch.float32, torch.float16))]
)
def test_dtypes(dtype):
    case = biased_case(dtype, T=7, H=35, I=19, device=DEVICE)
    assert_equals_reference(case, EPILOGUES["gpt_oss"], dtype)


def test_nan_passes_the_clamps():
    case = biased_case(torch.float32, T=7, pattern="every_expert", device=DEVICE)
    with torch.no_grad():
        case[0][4] = float("nan")
        output = fused_moe(*case[:5], activation=EPILOGUES["gpt_oss"])
    assert output[4].isnan().all() and output[:4].isfinite().all() and output[5:].isfinite().all()
