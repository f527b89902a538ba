"""The kernels on 4-bit codes as the host code launches them, compiled for GPUs that are not here."""

import pytest
import torch

pytest.importorskip("triton")

from absent_gpu import AbsentGpu
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from deepseek_cli.benchmarks import compile_check
from deepseek_kernels.epilogue import Epilogue
from deepseek_kernels.four_bit import FourBitFormat, PackedMatrices
from deepseek_kernels.gpu import combine, four_bit_codes, launch
from deepseek_kernels.gpu import experts as fused_moe_gpu
from deepseek_kernels.gpu.tiles import ROW_BUCKETS, TARGETS

CLAMPED = Epilogue(limit=7.0, alpha=1.702, shift=1.0, is_interleaved=True)
slow = pytest.mark.slow


@pytest.fixture
def launches(monkeypatch):
    """Compile every launch for one GPU; a list of (name, what Triton compiled)."""
    if JITFunction is not type(combine.combine_kernel):
        pytest.skip("the kernels are interpreted")
    made, zeros, original = [], torch.zeros, JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **settings):
        compiled = original(self, *arguments, grid=grid, warmup=True, **settings)
        made.append((self.__name__, compiled))
        return compiled

    def begin(gpu):
        monkeypatch.setattr(four_bit_codes, "has_ptx", lambda: TARGETS[gpu][0] == "cuda")
        driver.set_active(AbsentGpu(TARGETS[gpu]))
        return made

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(launch, "is_left_to_triton", True)
    monkeypatch.setattr(launch, "_known", {})  # constants of another GPU
    # Kernels that are compiled only write nothing: what they would fill has to be zero all the same.
    monkeypatch.setattr(torch, "empty", lambda *a, **k: zeros(*a, **k))
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    yield begin
    driver._active = None


def stacks(name, group_size, sizes, dtype):
    fmt = FourBitFormat.of(4, name, group_size)
    return [PackedMatrices(*fmt.empty(size, dtype, "cpu"), size, fmt, dtype) for size in sizes]


def run_layer(T, name="int4", group=128, *, H=2048, I=768, E=2, K=1, dtype=torch.bfloat16, form=None):  # noqa: E741
    x, bias = torch.zeros(T, H, dtype=dtype), None if form is None else torch.zeros(E, 2 * I, dtype=dtype)
    packed = stacks(name, group, ((E, 2 * I, H), (E, H, I)), dtype)
    ids, weights = torch.zeros(T, K, dtype=torch.int64), torch.zeros(T, K)
    fused_moe_gpu.forward(x, *packed, ids, weights, (form or Epilogue()).text, True, bias)


def check(made, gpu, names):
    assert [name for name, _ in made if "four_bit" in name or "dequantize" in name] == names
    for name, compiled in made:
        if TARGETS[gpu][0] == "hip":
            continue
        usage = compile_check._nvidia_usage(compiled, "mma")
        assert usage.shared <= compile_check.SHARED_LIMIT[TARGETS[gpu][1]] and usage.spills == 0, (name, usage)
        assert usage.has_matrix_instruction or "four_bit" not in name, name


BY_CODES = ["four_bit_gate_up_kernel", "four_bit_gemm_kernel"]
FORMS = [("int4", 128), ("int4", 32), ("nf4", 64)]
# Rows per expert: a decoding step, a prompt's, and as many as codes are multiplied by.
ROWS = (1, 2 * ROW_BUCKETS[0], 2 * ROW_BUCKETS[1])


def test_products_by_codes(launches):
    made = launches("sm_90")
    run_layer(ROWS[1], "int4", 128)
    check(made, "sm_90", BY_CODES)


@slow
@pytest.mark.parametrize("gpu", ["sm_90", "sm_80", "sm_100", "gfx942"])
@pytest.mark.parametrize(("name", "group"), FORMS)
def test_every_format_on_every_gpu(launches, gpu, name, group):
    made = launches(gpu)
    for rows in ROWS:
        run_layer(rows, name, group)
    check(made, gpu, BY_CODES * 3)


@slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "group"), FORMS)
def test_epilogues_biases_and_sizes_off_the_tile(launches, name, group, dtype):
    made = launches("sm_90")
    for rows in ROWS:
        run_layer(rows, name, group, H=384, I=128 * 3, dtype=dtype, form=CLAMPED)
        run_layer(rows, name, 32, H=96, I=160, dtype=dtype)
    check(made, "sm_90", BY_CODES * 6)


@slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("name", "group"), FORMS)
def test_dense_copies(launches, name, group, dtype):
    made = launches("sm_90")
    run_layer(2 * ROW_BUCKETS[1] + 2, name, group, dtype=dtype)
    check([one for one in made if "dequantize" in one[0]], "sm_90", ["dequantize_kernel"] * 2)
