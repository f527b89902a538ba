"""Every launch of a layer with LoRA as the host code makes it, compiled for GPUs that are not here.

The step of an adapter is added to accumulators that fill the registers as it is: nothing may spill but what spills
without it (``down_backward``, whose tile limits the registers).
"""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from absent_gpu import AbsentGpu
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from deepseek_cli.benchmarks import compile_check
from deepseek_kernels.epilogue import Epilogue
from deepseek_kernels.gpu import combine, experts, factor_gradients, launch, low_rank, tiles
from deepseek_kernels.gpu.adapters import make_adapters
from deepseek_kernels.gpu.low_rank_step import step_constants

PLAIN, CLAMPED = Epilogue(), Epilogue(limit=7.0, alpha=1.702, shift=1.0)
# Bytes per thread where the tile limits the registers, and in fp32, whose products take registers for both operands.
MOST_SPILLED = 16
# Sizes of no multiple of 8 take registers for addresses: without an adapter it is 248.
MOST_SPILLED_ODD = 256


@pytest.fixture
def launches(monkeypatch):
    """Compile every launch for one GPU with one set of tiles; a list of (name, what Triton compiled)."""
    if JITFunction is not type(combine.combine_kernel):
        pytest.skip("the kernels are interpreted")
    made, original = [], JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **settings):
        compiled = original(self, *arguments, grid=grid, warmup=True, **settings)
        made.append((self.__name__, compiled))
        return compiled

    def begin(gpu, chosen):
        monkeypatch.setattr(experts, "choose_tiles", lambda *arguments: chosen)
        driver.set_active(AbsentGpu(tiles.TARGETS[gpu]))
        return made

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(launch, "is_left_to_triton", True)
    yield begin
    driver._active = None


def run_layer(
    T=300,
    H=2048,
    I=768,  # noqa: E741
    E=4,
    K=2,
    r=16,
    *,
    dtype=torch.bfloat16,
    factor_dtype=torch.float32,
    epilogue=PLAIN,
):
    x, gate_up, down = (torch.zeros(n, dtype=dtype) for n in ((T, H), (E, 2 * I, H), (E, H, I)))
    ids, weights = torch.zeros(T, K, dtype=torch.int64), torch.zeros(T, K)
    sizes = ((H, 2 * I), (I, H))
    factors = [torch.zeros(n, dtype=factor_dtype) for N, M in sizes for n in ((E * r, N), (M, r * E))]
    rows, operands = [x.new_zeros(T * K, r) for _ in range(2)], (x, gate_up, down)
    pair = make_adapters(factors, (2.0, 2.0), rows, E)
    _, kept, order = experts.forward(*operands, ids, weights, epilogue.text, True, None, pair)
    needs = [True, False, False, True, False]
    experts.backward(x, *operands, order, weights, kept, epilogue.text, needs, pair)


def check(made, gpu, limited=MOST_SPILLED, free=0):
    names = [name for name, _ in made]
    assert names.count("low_rank_rows_kernel") == 4 and names.count("factor_gradients_kernel") == 1
    assert names.count("transpose_pair_kernel") == 2
    assert names.count("grouped_gemm_kernel") == 2 and "weight_gradient_kernel" not in names
    target = tiles.TARGETS[gpu]
    usage_of = compile_check._amd_usage if target[0] == "hip" else compile_check._nvidia_usage
    for name, compiled in made:
        usage = usage_of(compiled, compile_check.MATRIX_INSTRUCTION[target[1]])
        is_limited = name == "down_backward_kernel" and getattr(compiled.metadata, "maxnreg", None)
        assert usage.spills <= (limited if is_limited else free), (name, usage)
        assert usage.shared <= compile_check.SHARED_LIMIT[target[1]], (name, usage)
        print(gpu, name, usage)


def compile_by_hand(function, constants, tile):
    blocks = compile_check.Compilation("low_rank", "", True, function, constants, tile.launch_options)
    return compile_check.compile_for(blocks, tiles.TARGETS["sm_90"])


def test_the_thin_products_multiply_on_tensor_cores():
    """Two of eight, at the sizes of production."""
    chosen = tiles.SHIPPED["sm_90", 0, 0, 2]
    tile = low_rank.rows_tile(chosen.down, 16)
    constants = low_rank.low_rank_rows_constants(
        torch.bfloat16, 128, 2048, 16, 8, scaling=2.0, transpose=True, is_by_token=True, tile=tile
    )
    rows = compile_by_hand(low_rank.low_rank_rows_kernel, constants, tile)
    tile = factor_gradients.gradient_tile(chosen.weight_gradient, 16)
    sizes = (2048, 16, 768, 16, 1536, 16, 2048, 16)
    constants = factor_gradients.factor_gradients_constants(torch.bfloat16, (torch.float32,) * 4, sizes, 8, tile=tile)
    gradient = compile_by_hand(factor_gradients.factor_gradients_kernel, constants, tile)
    for usage in (rows, gradient):
        assert usage.has_matrix_instruction and usage.spills == 0 and usage.registers <= 128


def test_the_step_of_an_adapter_takes_no_registers_that_are_not_there():
    """The two kernels with the fewest to spare, by descriptor as they ship."""
    found = [
        compilation
        for compilation in compile_check.row_kernels(tiles.SHIPPED["sm_90", 0, 0, 2])
        if compilation.kernel in ("gate_up", "down_backward") and compilation.tile.endswith("64 by descriptor")
    ]
    for compilation in found:
        constants = {n: v for n, v in compilation.constants.items() if n not in ("low_ptr", "factor_ptr")}
        with_step = dataclasses.replace(compilation, constants={**constants, **step_constants(16)})
        usage = compile_check.compile_for(with_step, tiles.TARGETS["sm_90"])
        assert usage.spills <= (MOST_SPILLED if "maxnreg" in compilation.options else 0), (compilation.kernel, usage)
    assert len(found) == 2


@pytest.mark.slow
@pytest.mark.parametrize("bucket", [0, 1, 2])
@pytest.mark.parametrize("gpu", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_launch(launches, gpu, bucket):
    made = launches(gpu, tiles.SHIPPED[gpu, 0, 0, bucket])
    run_layer()
    check(made, gpu)


@pytest.mark.slow
@pytest.mark.parametrize("r", [1, 8, 64, 96])
def test_ranks(launches, r):
    made = launches("sm_90", tiles.SHIPPED["sm_90", 0, 0, 2])
    run_layer(r=r)
    check(made, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bucket", [0, 2])
def test_dtypes(launches, dtype, bucket):
    made = launches("sm_90", tiles.SHIPPED["sm_90", 0, 0, bucket].for_dtype(dtype))
    run_layer(dtype=dtype, factor_dtype=dtype)
    check(made, "sm_90", free=MOST_SPILLED if dtype == torch.float32 else 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "epilogue", [CLAMPED, dataclasses.replace(CLAMPED, is_interleaved=True)], ids=["rows", "twos"]
)
def test_epilogues(launches, epilogue):
    made = launches("sm_90", tiles.SHIPPED["sm_90", 0, 0, 2])
    run_layer(epilogue=epilogue)
    check(made, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"H": 35, "I": 19}, {"H": 24, "I": 40}, {"E": 1, "K": 1}, {"T": 1}], ids=str)
def test_odd_shapes(launches, shape):
    made = launches("sm_90", tiles.SHIPPED["sm_90", 0, 0, 2])
    run_layer(**shape)
    check(made, "sm_90", limited=MOST_SPILLED if shape.get("H", 16) % 8 == 0 else MOST_SPILLED_ODD)


@pytest.mark.slow
def test_another_number_of_tokens_compiles_nothing(launches):
    made = launches("sm_90", tiles.SHIPPED["sm_90", 0, 0, 0])
    run_layer(601, 16, 16, 8, 2)  # up to 1024 slots are sorted by another kernel
    first = {(name, compiled.hash) for name, compiled in made}
    run_layer(4096, 16, 16, 8, 2)
    assert {(name, compiled.hash) for name, compiled in made} == first
