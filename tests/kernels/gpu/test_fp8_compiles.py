"""The FP8 kernels as the host code launches them, compiled for GPUs that are not here: tensor cores, spills, memory.

Every product must multiply codes and keep its registers out of memory: what a step gives takes as many registers as
the sums it is added to, and a tile with more columns would spill.
"""

import re

import pytest
import torch

pytest.importorskip("triton")

from absent_gpu import AbsentGpu
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from deepseek_cli.benchmarks import compile_check
from deepseek_kernels.cpu.fp8_experts import Weights
from deepseek_kernels.epilogue import Epilogue
from deepseek_kernels.gpu import combine, fp8_experts, fp8_tiles, launch
from deepseek_kernels.gpu import tiles as plain_tiles

TARGETS = {"sm_89": ("cuda", 89, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32)}
INSTRUCTION = {
    "sm_89": "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32",
    "sm_90": "k32.f32.e4m3.e4m3",
    "sm_100": "tcgen05.mma",
}
SHARED_LIMIT = {"sm_89": 101376, "sm_90": 232448, "sm_100": 232448}
CLAMPED = Epilogue(limit=7.0, alpha=1.702, shift=1.0)
slow = pytest.mark.slow


@pytest.fixture
def launches(monkeypatch):
    """Compile every launch for one GPU with one set of tiles; a list of (name, what Triton compiled)."""
    if JITFunction is not type(combine.combine_kernel):
        pytest.skip("the kernels are interpreted")
    made, zeros, original = [], torch.zeros, JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **settings):
        compiled = original(self, *arguments, grid=grid, warmup=True, **settings)
        made.append((self.__name__, compiled))
        return compiled

    def begin(gpu, tiles):
        bucket = ("FEW_ROWS", "SOME_ROWS").index(tiles) if tiles in ("FEW_ROWS", "SOME_ROWS") else 2
        family = "sm_80" if gpu == "sm_89" else gpu
        monkeypatch.setattr(fp8_tiles, "choose_tiles", lambda *_: plain_tiles.SHIPPED[family, 0, 0, bucket])
        for module in (fp8_experts, fp8_tiles):
            monkeypatch.setattr(module, "choose_fp8_tiles", lambda *arguments: getattr(fp8_tiles, tiles))
        driver.set_active(AbsentGpu(TARGETS[gpu]))
        return made

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(launch, "is_left_to_triton", True)
    # Kernels that are compiled only write nothing: what they would fill has to be zero all the same.
    monkeypatch.setattr(torch, "empty", lambda *a, **k: zeros(*a, **k))
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    yield begin
    driver._active = None


def run_layer(T=300, H=2048, I=768, E=4, K=2, *, epilogue=None, has_bias=False, rank=0):  # noqa: E741
    x, gate_up, down = (torch.zeros(n, dtype=torch.bfloat16) for n in ((T, H), (E, 2 * I, H), (E, H, I)))
    ids, topk_weights, weights = torch.zeros(T, K, dtype=torch.int64), torch.zeros(T, K), Weights(gate_up, down)
    text, bias = (epilogue or Epilogue()).text, x.new_zeros(E, 2 * I) if has_bias else None
    order = fp8_experts.route(ids, E)
    factors = [torch.zeros(n) for N, M in ((H, 2 * I), (I, H)) for n in ((E * rank, N), (M, rank * E))]
    pair = fp8_experts.make_adapters(factors, (2.0, 2.0), None, order, x.dtype)
    _, kept = fp8_experts.forward(x, weights, order, topk_weights, text, bias, adapters=pair)
    needs = (True, False, False, True, has_bias)  # weight gradients are not in FP8
    fp8_experts.backward(x, x, weights, order, topk_weights, kept, text, needs, adapters=pair)


def check(made, gpu, tiles):
    products = 0
    for name, compiled in made:
        usage = compile_check._nvidia_usage(compiled, INSTRUCTION[gpu])
        assert usage.shared <= SHARED_LIMIT[gpu] and usage.spills == 0, (name, usage)
        is_product = name in ("gate_up_fp8_kernel", "grouped_gemm_fp8_kernel", "down_backward_fp8_kernel")
        products += is_product
        if is_product and tiles.block_m >= 64:  # Triton widens smaller tiles to fp16, in which the codes are exact.
            assert usage.has_matrix_instruction, name
    assert products == 4


@pytest.mark.parametrize(
    "gpu,tiles",
    [
        ("sm_90", "MANY_ROWS"),
        *(pytest.param("sm_90", name, marks=slow) for name in ("SOME_ROWS", "FEW_ROWS")),
        *(pytest.param("sm_89", name, marks=slow) for name in ("SAFE", "FEW_ROWS")),
        *(pytest.param("sm_100", name, marks=slow) for name in ("MANY_ROWS_SM_100", "SOME_ROWS", "FEW_ROWS")),
    ],
)
def test_every_launch(launches, gpu, tiles):
    made = launches(gpu, tiles)
    run_layer()
    check(made, gpu, getattr(fp8_tiles, tiles))


@slow
@pytest.mark.parametrize(
    "gpu,tiles,rank",
    [
        *(("sm_90", name, 16) for name in ("MANY_ROWS", "SOME_ROWS", "FEW_ROWS")),
        *(("sm_90", "MANY_ROWS", rank) for rank in (1, 64)),
        *(("sm_89", name, 16) for name in ("SAFE", "FEW_ROWS")),
        *(("sm_100", name, 16) for name in ("MANY_ROWS_SM_100", "SOME_ROWS", "FEW_ROWS")),
    ],
)
def test_every_launch_under_an_adapter(launches, gpu, tiles, rank):
    made = launches(gpu, tiles)
    run_layer(rank=rank)
    check(made, gpu, getattr(fp8_tiles, tiles))
    names = [name for name, _ in made]
    assert names.count("low_rank_rows_kernel") == 4 and names.count("factor_gradients_kernel") == 1


@slow
@pytest.mark.parametrize("is_descriptor", [True, False])
def test_a_clamped_epilogue_with_a_bias(launches, is_descriptor, monkeypatch):
    made = launches("sm_90", "MANY_ROWS")
    if not is_descriptor:
        for file in ("fp8_gate_up", "fp8_grouped_gemm", "fp8_down_backward"):
            monkeypatch.setattr(f"deepseek_kernels.gpu.{file}.weight_operand", lambda weights, *_: weights)
    run_layer(epilogue=CLAMPED, has_bias=True)
    check(made, "sm_90", fp8_tiles.MANY_ROWS)


@slow
@pytest.mark.parametrize("shape", [{"H": 35, "I": 19}, {"H": 136, "I": 264}, {"E": 1, "K": 1}], ids=str)
def test_odd_shapes(launches, shape):
    made = launches("sm_90", "MANY_ROWS")
    run_layer(**shape)
    check(made, "sm_90", fp8_tiles.MANY_ROWS)


@slow
@pytest.mark.parametrize("tiles,H,I", [("FEW_ROWS", 16, 5), ("SOME_ROWS", 16, 64), ("SOME_ROWS", 1, 1)])
def test_no_codes_are_known_at_compile_time(launches, tiles, H, I):  # noqa: E741
    """Of a pair of constant codes that goes to several places ptxas 12.8 leaves one unwritten."""
    made = launches("sm_90", tiles)
    run_layer(7, H, I, E=3)
    conversions = [re.findall(r"e4m3x2\.f32\s+%rs\d+, (%r\d+), (%r\d+);", one.asm["ptx"]) for _, one in made]
    assert sum(map(len, conversions)) >= 64
    assert not any(high == low for pairs in conversions for high, low in pairs)


@slow
def test_another_number_of_tokens_compiles_nothing(launches):
    made = launches("sm_90", "MANY_ROWS")
    run_layer(601, 128, 128)  # up to 1024 slots are sorted by another kernel
    first = {(name, compiled.hash) for name, compiled in made}
    run_layer(4096, 128, 128)
    assert {(name, compiled.hash) for name, compiled in made} == first
