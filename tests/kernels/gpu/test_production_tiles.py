"""The layer with the tiles that training runs with, compared tile by tile at sizes where every loop is in full swing.

On a GPU these are its own tiles; in Triton's interpreter (``test_in_interpreter.py``) those shipped for sm_90. The
other tests' shapes are below one such tile: their kernels never reach the steady state of the software pipeline.
"""

import dataclasses
import os

import pytest
import torch

pytest.importorskip("triton")
if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from moe_cases import assert_tiles_equal_reference, make_case, runs_descriptors

from deepseek_kernels.fused_moe import fused_moe
from deepseek_kernels.gpu import experts as fused_moe_gpu
from deepseek_kernels.gpu.tiles import ROW_KERNELS, SHIPPED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATTERNS = ["any", "some_unused", "empty_experts", "one_expert", "all_unused", "skewed", "every_expert"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
# The tile's multiple, and neighbors above and below that load in other widths: by 8, and by 1.
SIZES = [(512, 256), (520, 264), (511, 257)]
pytestmark = pytest.mark.usefixtures("guarded_buffers", "production_tiles")


@pytest.fixture
def production_tiles(monkeypatch):
    """Under the interpreter, the tiles of an H100 in place of small ones."""

    def choose(device, hidden, width, bucket, dtype):
        return SHIPPED["sm_90", 0, 0, bucket].for_dtype(dtype)

    if DEVICE == "cpu":
        monkeypatch.setattr(fused_moe_gpu, "choose_tiles", choose)


def case_of(dtype, *, rows, H, I, E=4, pattern="some_unused"):  # noqa: E741
    """A case of `rows` slots per expert, used or not."""
    K = E if pattern == "every_expert" else 2
    return make_case(dtype, T=rows * E // K, H=H, I=I, E=E, K=K, pattern=pattern, device=DEVICE)


def test_a_tile_of_every_kernel():
    """Two experts with a whole row tile and a part of one each, in bf16."""
    case = case_of(torch.bfloat16, rows=140, H=264, I=136, E=2, pattern="any")
    assert_tiles_equal_reference(fused_moe, case, torch.bfloat16)


@pytest.fixture(params=["descriptor", "pointer"])
def either_way(request, monkeypatch, production_tiles):
    """The production tiles with all weights by descriptor, and with all by pointer, whichever ships."""
    if request.param == "descriptor" and not runs_descriptors():
        pytest.skip("there is no copy engine before sm_90")
    original, by = fused_moe_gpu.choose_tiles, request.param == "descriptor"

    def choose(*arguments):
        tiles = original(*arguments)
        rows = {name: dataclasses.replace(getattr(tiles, name), uses_descriptor=by) for name in ROW_KERNELS}
        return dataclasses.replace(tiles, **rows)

    monkeypatch.setattr(fused_moe_gpu, "choose_tiles", choose)


# 264 = 8 * 33: rows of a multiple of 16 bytes that no tile divides; rows of 2 * 257 bytes take pointers.
@pytest.mark.parametrize(
    "rows,H,I",
    [
        (40, 72, 40),
        *(pytest.param(*s, marks=pytest.mark.slow) for s in ((1000, 512, 256), (100, 264, 136), (100, 511, 257))),
    ],
)
def test_weights_by_descriptor_and_by_pointer(either_way, rows, H, I):  # noqa: E741
    case = case_of(torch.bfloat16, rows=rows, H=H, I=I)
    assert_tiles_equal_reference(fused_moe, case, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [100, 1000])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(pattern, rows):
    case = case_of(torch.bfloat16, rows=rows, H=512, I=256, pattern=pattern)
    assert_tiles_equal_reference(fused_moe, case, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H,I", SIZES)
@pytest.mark.parametrize("rows", [12, 40, 100, 1000])
def test_dtypes_and_neighbors(rows, H, I, dtype):  # noqa: E741
    case = case_of(dtype, rows=rows, H=H, I=I)
    assert_tiles_equal_reference(fused_moe, case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_activations(activation):
    case = case_of(torch.bfloat16, rows=100, H=512, I=256)
    assert_tiles_equal_reference(fused_moe, case, torch.bfloat16, activation)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_random_shapes(seed):
    """Shapes around the tiles' edges: one below, at and one above a multiple."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options):
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    dtype, pattern = DTYPES[seed % 4], pick(PATTERNS)
    H, I = pick([128, 255, 256, 257, 320, 512]), pick([64, 127, 128, 129, 192, 256])  # noqa: E741
    case = case_of(dtype, rows=pick([65, 127, 128, 129, 300]), H=H, I=I, E=pick([1, 3, 5]), pattern=pattern)
    assert_tiles_equal_reference(fused_moe, case, dtype)
