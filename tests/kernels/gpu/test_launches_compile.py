"""Every launch of the layer, as it would happen on a GPU that is not here, compiled instead of run.

``test_compile_check.py`` compiles kernels as told by a table. Here the real host code calls them, with the integers
and alignments that odd shapes bring: Triton makes another kernel of an argument that is 1 or no multiple of 16.
"""

import pytest
import torch

pytest.importorskip("triton")

import triton
from absent_gpu import AbsentGpu
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from deepseek_cli.benchmarks import compile_check
from deepseek_kernels.gpu import combine, launch, tiles
from deepseek_kernels.gpu import experts as fused_moe_gpu

# T, K, E, H, I
SHAPES = [
    (7, 1, 1, 64, 32),  # one expert, one slot: both integers are 1
    (7, 2, 2, 64, 32),  # every expert for every token
    (7, 3, 7, 64, 32),  # E no power of two
    (7, 3, 384, 64, 32),
    (1, 8, 16, 64, 32),  # decoding
    (5, 64, 64, 64, 32),  # as many slots as there may be
    (200, 12, 16, 64, 32),  # some rows per expert
    (3000, 8, 16, 64, 32),  # many rows per expert
    (70, 2, 8, 35, 19),  # nothing divisible
    (70, 2, 8, 64, 19),
    (70, 2, 8, 1, 1),
    (70, 2, 8, 24, 40),  # by 8, not by 16
    (70, 2, 8, 2048, 768),
]


@pytest.fixture(params=["sm_80", "sm_90", "sm_100", "gfx942"])
def launches(request, monkeypatch):
    """Compile every launch for this GPU; the list of (kernel's name, what came of it)."""
    if JITFunction is not type(combine.combine_kernel):
        pytest.skip("the kernels are interpreted")
    made, target = [], tiles.TARGETS[request.param]
    original = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **settings):
        assert settings["enable_fp_fusion"], f"{self.__name__}: left open, Triton warns, and will turn it off"
        compiled = original(self, *arguments, grid=grid, warmup=True, **settings)
        made.append((self.__name__, compiled.metadata))
        return compiled

    def choose(device, hidden, width, bucket, dtype):
        return tiles.SHIPPED[request.param, tiles.ANY, tiles.ANY, bucket].for_dtype(dtype)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(launch, "is_left_to_triton", True)
    monkeypatch.setattr(fused_moe_gpu, "choose_tiles", choose)
    driver.set_active(AbsentGpu(target))
    yield made
    driver._active = None
    assert made
    for name, metadata in made:
        assert metadata.shared <= compile_check.SHARED_LIMIT[target[1]], (name, metadata)


@pytest.fixture
def compiled_names(monkeypatch):
    """Whatever Triton would compile for an H100, counted instead: a list of kernels' names, one per compilation."""
    if JITFunction is not type(combine.combine_kernel):
        pytest.skip("the kernels are interpreted")
    made, seen, original = [], set(), JITFunction.run

    def count(key, repr, fn, compile, is_manual_warmup, already_compiled):
        if (fn.name, key) not in seen:
            seen.add((fn.name, key))
            made.append(fn.name)
        return True  # Nothing is compiled.

    def compile_only(self, *arguments, grid, warmup, **settings):
        return original(self, *arguments, grid=grid, warmup=True, **settings)

    def choose(device, hidden, width, bucket, dtype):
        return tiles.SHIPPED["sm_90", tiles.ANY, tiles.ANY, bucket].for_dtype(dtype)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(launch, "is_left_to_triton", True)
    monkeypatch.setattr(fused_moe_gpu, "choose_tiles", choose)
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", count)
    driver.set_active(AbsentGpu(tiles.TARGETS["sm_90"]))
    yield made
    driver._active = None


class LaunchesOfTorch(TorchDispatchMode):
    """What torch would launch on a GPU by itself: every operator but those that only allocate or look otherwise."""

    FREE = ("empty", "empty_like", "new_empty", "detach", "alias", "view", "unsqueeze")

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        name = function.overloadpacket.__name__
        if name not in self.FREE:
            self.names.append(name)
        return function(*arguments, **(settings or {}))


@pytest.fixture
def launched_names(monkeypatch, compiled_names):
    """The names of what is launched, Triton's kernels and torch's, one per launch; nothing is compiled."""
    names, compile_only = [], JITFunction.run

    def note(self, *arguments, **settings):
        names.append(self.__name__)
        return compile_only(self, *arguments, **settings)

    monkeypatch.setattr(JITFunction, "run", note)
    with LaunchesOfTorch(names):
        yield names


# Up to 4 tokens; up to 1024 slots, which one kernel sorts; more.
@pytest.mark.parametrize(("T", "wanted"), [(4, [2, 3, 6]), (128, [4, 4, 6]), (200, [5, 5, 6]), (1500, [5, 5, 6])])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_launches_of_a_layer(launched_names, T, wanted, dtype):
    """Forward without gradients, forward with them, backward: each costs the host some microseconds."""
    x, gate_up, down = (torch.empty(size, dtype=dtype) for size in ((T, 64), (16, 64, 64), (16, 64, 32)))
    ids, weights = torch.empty(T, 8, dtype=torch.int64), torch.empty(T, 8, dtype=dtype)
    operands, counts = (x, gate_up, down), []

    def count(function, *arguments):
        launched_names.clear()
        result = function(*arguments)
        counts.append(len(launched_names))
        return result

    count(fused_moe_gpu.forward, *operands, ids, weights, "silu", False)
    _, kept, metadata = count(fused_moe_gpu.forward, *operands, ids, weights, "silu", True)
    needs = [True] * 4 + [False]
    count(fused_moe_gpu.backward, x, *operands, metadata, weights, kept, "silu", needs)
    assert counts == wanted, launched_names


def test_two_hundred_lengths_of_a_batch_compile_fifteen_kernels(compiled_names):
    """A kernel for each number of tokens would stop a training for seconds, time and again, on every rank."""
    lengths = torch.randint(1000, 8192, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    for T in lengths:
        run_layer((T, 2, 8, 16, 16), torch.bfloat16)
    assert len(compiled_names) <= 15, sorted(compiled_names)


def test_decoding_any_number_of_tokens_compiles_few_kernels(compiled_names):
    for T in range(1, 65):
        x, gate_up, down = (torch.zeros(n, dtype=torch.bfloat16) for n in ((T, 16), (8, 32, 16), (8, 16, 16)))
        ids, weights = torch.zeros(T, 2, dtype=torch.int64), torch.zeros(T, 2)
        fused_moe_gpu.forward(x, gate_up, down, ids, weights, "silu", False)
    assert len(compiled_names) <= 10, sorted(compiled_names)


def run_layer(shape, dtype, index_dtype=torch.int64, activation="silu"):
    T, K, E, H, I = shape  # noqa: E741
    x, gate_up, down = torch.zeros(T, H), torch.zeros(E, 2 * I, H), torch.zeros(E, H, I)
    x, gate_up, down = (t.to(dtype) for t in (x, gate_up, down))
    ids, weights = torch.zeros(T, K, dtype=index_dtype), torch.zeros(T, K)
    fused_moe_gpu.forward(x, gate_up, down, ids, weights, activation, False)
    _, kept, metadata = fused_moe_gpu.forward(x, gate_up, down, ids, weights, activation, True)
    fused_moe_gpu.backward(x, x, gate_up, down, metadata, weights, kept, activation, [True] * 4 + [False])


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(launches, shape):
    run_layer(shape, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 2, 8, 33, 17), (200, 12, 16, 64, 48), (3000, 8, 16, 64, 48)], ids=str)
def test_every_dtype(launches, dtype, shape):
    run_layer(shape, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_every_activation_and_narrow_indices(launches, activation):
    run_layer((9, 2, 8, 64, 48), torch.bfloat16, torch.int32, activation)
