"""Every kernel, with every shipped tile, compiles for GPUs that are not here, fits them and does not spill.

The exception is a tile that limits the registers a thread may have; it may spill a few bytes.
"""

import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("triton")

from deepseek_cli.benchmarks import compile_check
from deepseek_kernels.gpu.tiles import SAFE, SHIPPED, TARGETS
from deepseek_kernels.gpu.tune import CANDIDATES

EVERYTHING = list(compile_check.every_compilation())
# By default one target and the two kernels that have spilled before; the rest is `slow`.
QUICK = [e for e in EVERYTHING if e[0] == "sm_90" and e[2].tile.startswith("128x128x64")]
# Bytes per thread where the tile limits the registers: two programs at once are worth it, measured on an H200.
MOST_SPILLED = 32


def check(target, compilation):
    usage = compile_check.compile_for(compilation, target)
    arch = target[1]
    assert usage.shared <= compile_check.SHARED_LIMIT[arch]
    assert usage.spills <= (MOST_SPILLED if "maxnreg" in compilation.options else 0)
    assert usage.has_matrix_instruction or not compilation.is_matrix
    print(target, compilation.kernel, compilation.tile, usage)


def name_of(entry):
    return f"{entry[1][1]}-{entry[2].kernel}-{entry[2].tile}-{entry[2].options.get('num_stages', '')}"


def test_the_quick_part_is_not_empty_and_all_targets_are_covered():
    assert {e[2].kernel for e in QUICK} == {"gate_up", "down_backward"}
    assert {e[1] for e in EVERYTHING} == set(TARGETS.values()) and {gpu for gpu, *_ in SHIPPED} == set(TARGETS)


@pytest.mark.parametrize("entry", QUICK, ids=name_of)
def test_compiles_quick(entry):
    check(*entry[1:])


@pytest.mark.slow
@pytest.mark.parametrize("entry", EVERYTHING, ids=name_of)
def test_compiles(entry):
    check(*entry[1:])


OTHER_DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def other_dtypes():
    """The five products in every dtype but bf16, with the tiles `for_dtype` makes of each that ships."""
    seen = set()
    shipped = [(gpu, tiles) for (gpu, *_), tiles in SHIPPED.items()] + [(gpu, SAFE) for gpu in TARGETS]
    for (gpu, tiles), (name, dtype) in itertools.product(shipped, OTHER_DTYPES.items()):
        for compilation in compile_check.row_kernels(tiles.for_dtype(dtype), dtype):
            key = (TARGETS[gpu], name, compilation.kernel, str(compilation.constants), str(compilation.options))
            if key not in seen:
                seen.add(key)
                yield pytest.param(
                    TARGETS[gpu], name, compilation, id=f"{name}-{name_of((gpu, TARGETS[gpu], compilation))}"
                )


@pytest.mark.slow
@pytest.mark.parametrize("target,dtype,compilation", other_dtypes())
def test_other_dtypes_compile_fit_and_do_not_spill(target, dtype, compilation):
    usage = compile_check.compile_for(compilation, target, dtype)
    assert usage.shared <= compile_check.SHARED_LIMIT[target[1]]
    assert usage.spills <= (MOST_SPILLED if "maxnreg" in compilation.options else 0)
    assert usage.has_matrix_instruction or dtype != "fp16"


def candidates():
    """Every tile that tuning tries, once for each kernel that it is for."""
    for name, tiles in CANDIDATES.items():
        for tile in tiles:
            for compilation in compile_check.row_kernels(dataclasses.replace(SAFE, **{name: tile})):
                if compilation.kernel.startswith(name) and (name == "down_backward") == (
                    compilation.kernel == "down_backward"
                ):
                    yield "sm_90", TARGETS["sm_90"], compilation


@pytest.mark.slow
@pytest.mark.parametrize("entry", candidates(), ids=name_of)
def test_what_tuning_tries_compiles(entry):
    check(*entry[1:])
