"""The second launch of a kernel gives its driver what the first did, and a different one does not pass for it.

No GPU: Triton compiles for one that is absent, and a launcher takes down what it is given.
"""

import pytest
import torch

pytest.importorskip("triton")

from absent_gpu import AbsentGpu
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from deepseek_kernels.gpu import combine as combine_file
from deepseek_kernels.gpu import launch as launch_file
from deepseek_kernels.gpu.combine import combine, combine_gradients
from deepseek_kernels.gpu.tiles import TARGETS


class Utilities:
    """What Triton asks of a driver to load a kernel."""

    def load_binary(self, *arguments):
        return 1, 2, 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

    def unload_module(self, module):
        pass


class Launcher:
    """Notes every launch of a kernel; Triton makes one per kernel it compiles, and keeps it."""

    made, by = [], "again"

    def __init__(self, source, metadata):
        pass

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        Launcher.made.append((Launcher.by, (x, y, z), arguments))


@pytest.fixture
def launched(monkeypatch):
    """(by, grid and arguments) of every launch; by is ``triton`` or ``again``."""
    if torch.cuda.is_available() or JITFunction is not type(combine_file.combine_kernel):
        pytest.skip("the kernels run")
    combine_file.combine_kernel.device_caches.clear()
    run = JITFunction.run

    def noted(self, *arguments, **settings):
        with monkeypatch.context() as patch:
            patch.setattr(Launcher, "by", "triton")
            return run(self, *arguments, **settings)

    gpu = AbsentGpu(TARGETS["sm_90"])
    gpu.utils, gpu.launcher_cls = Utilities(), Launcher
    driver.set_active(gpu)
    monkeypatch.setattr(JITFunction, "run", noted)
    monkeypatch.setattr(launch_file, "_known", {})
    monkeypatch.setattr(Launcher, "made", [])
    yield Launcher.made
    launch_file._known.clear()
    combine_file.combine_kernel.device_caches.clear()
    driver._active = None


def of(dtype=torch.bfloat16, *, T=3, K=2, H=32, offset=0):
    rows = torch.zeros(T * K * H + 16, dtype=dtype)[offset : offset + T * K * H].view(T * K, H)
    return rows, torch.zeros(T * K, dtype=torch.int32), torch.zeros(T, K)


def test_the_second_launch_gives_what_the_first_gave(launched):
    rows, slot_row, weights = of()
    for _ in range(2):
        combine(rows, slot_row, 2, weights)
    (first, *one), (second, *other) = launched
    assert (first, second) == ("triton", "again")
    assert one[0] == other[0] == (3, 1, 1)
    addresses, again = ([a.data_ptr() if isinstance(a, torch.Tensor) else a for a in how[1]] for how in (one, other))
    output = 3  # made anew each time
    assert again[:output] == addresses[:output] and again[output + 1 :] == addresses[output + 1 :]


def test_another_kind_of_launch_is_left_to_triton_first(launched):
    rows, slot_row, weights = of()
    combine(rows, slot_row, 2, weights)
    for dtype, router, T, H in (
        (torch.float16, torch.float32, 3, 32),
        (torch.bfloat16, torch.bfloat16, 3, 32),
        (torch.bfloat16, torch.float32, 3, 48),
    ):
        rows, slot_row, weights = of(dtype, T=T, H=H)
        combine(rows, slot_row, 2, weights.to(router))
    combine_gradients(rows, slot_row, weights, torch.zeros(2, 6))
    combine_gradients(rows, slot_row, weights, torch.zeros(3, 6))
    assert [how for how, *_ in launched] == ["triton"] * 6
    combine(*of(T=5)[:2], 2, of(T=5)[2])
    assert launched[-1][:2] == ("again", (5, 1, 1))


def test_operands_off_sixteen_bytes_are_left_to_triton(launched):
    for offset in (0, 0, 1, 1, 0):
        rows, slot_row, weights = of(offset=offset)
        combine(rows, slot_row, 2, weights)
    assert [how for how, *_ in launched] == ["triton", "again", "triton", "triton", "again"]
