"""Which tile sizes each kernel runs with: a shipped table, what a user's own tuning found, or a safe default.

Every launch asks `choose_tiles`. The key is the GPU, H, I and a bucket of rows per expert, never the number of tokens:
two batches of different length run the same kernels. Nothing is measured here; ``tune`` does that on request, and
writes the file this one reads.

The sizes for many rows on sm_90 were chosen by timing on an H200; all others by compiling alone
(registers, spills, shared memory; the tests repeat it).
"""

import dataclasses
import functools
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

logger = logging.getLogger(__name__)

# Upper ends of the buckets of mean rows per expert; 16-row tiles waste little where an expert has a handful of rows.
ROW_BUCKETS = (16, 64)
ANY = 0
ROW_KERNELS = ("gate_up", "down", "down_backward", "input_gradient")


@dataclass(frozen=True)
class Tile:
    """Sizes of one kernel's tiles, for two-byte elements.

    Attributes:
        block_m: Rows (of the result).
        block_n: Columns; of gate and of up each, in `gate_up`.
        block_k: Inner elements a step.
        num_warps: Warps a program.
        num_stages: Steps in flight.
        group_m: Row tiles walked before the next column block.
        max_registers: Registers per thread that the compiler may use at most, so that two programs fit; 0
            leaves it free.
        uses_descriptor: Whether weights come by descriptor (``weight_blocks``); sm_90 and later.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    max_registers: int = 0
    uses_descriptor: bool = False

    @property
    def constants(self) -> dict[str, int]:
        """What the kernel takes at compile time."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "GROUP_M": self.group_m}

    @property
    def launch_options(self) -> dict[str, int]:
        """What Triton takes at compile time."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {**options, "maxnreg": self.max_registers} if self.max_registers else options


@dataclass(frozen=True)
class Tiles:
    """The tiles of one call's kernels; the four that walk rows share one `block_m`, as they share the tile map."""

    gate_up: Tile
    down: Tile
    down_backward: Tile
    input_gradient: Tile
    weight_gradient: Tile

    @property
    def block_m(self) -> int:
        """Rows a tile of the row kernels."""
        return self.gate_up.block_m

    def for_dtype(self, dtype: torch.dtype) -> "Tiles":
        """Return the same, cut so that wider elements take no more shared memory and registers.

        Args:
            dtype: Of the operands.
        """
        if dtype.itemsize <= 2:
            return self
        return _cut_all(self, dtype.itemsize)


@functools.lru_cache(maxsize=256)
def _cut_all(tiles: Tiles, itemsize: int) -> Tiles:
    return Tiles(**{f.name: _cut(f.name, getattr(tiles, f.name), itemsize) for f in dataclasses.fields(tiles)})


def _cut(name: str, tile: Tile, itemsize: int) -> Tile:
    """A tile for elements of 4 or 8 bytes, which no tensor core multiplies: accumulators fill the registers.

    `gate_up` has two of them: of 64 rows with 4 warps it spilled, and so did fp64 of 64 columns (compiled for sm_90).
    The limit of registers and the descriptors were measured with two-byte elements, and are left to them.
    """
    is_double = name == "gate_up"
    widest = 64 if name == "down_backward" else (256 if is_double else 512) // itemsize
    return dataclasses.replace(
        tile,
        block_n=min(tile.block_n, widest),
        block_k=max(16, tile.block_k * 2 // itemsize),
        num_warps=8 if is_double and tile.block_m >= 64 else tile.num_warps,
        max_registers=0,
        uses_descriptor=False,
    )


# Under 64 KiB of shared memory in bf16 and under 128 accumulators a thread: runs on anything Triton compiles for.
SAFE = Tiles(
    gate_up=Tile(64, 64, 32, 4, 2),
    down=Tile(64, 64, 32, 4, 3),
    down_backward=Tile(64, 64, 32, 4, 2),
    input_gradient=Tile(64, 64, 32, 4, 3),
    weight_gradient=Tile(64, 64, 32, 4, 2),
)
_FEW_ROWS = Tiles(
    gate_up=Tile(16, 64, 128, 4, 3),
    down=Tile(16, 64, 128, 4, 4),
    down_backward=Tile(16, 64, 64, 4, 3),
    input_gradient=Tile(16, 64, 128, 4, 4),
    weight_gradient=Tile(64, 128, 16, 4, 2),
)
_HOPPER_SOME_ROWS = Tiles(
    gate_up=Tile(64, 64, 64, 4, 4),
    down=Tile(64, 128, 64, 4, 4),
    down_backward=Tile(64, 64, 64, 4, 4),
    input_gradient=Tile(64, 128, 64, 4, 4),
    weight_gradient=Tile(128, 128, 32, 8, 3),
)
# Timed on an H200 (docs/experiments.md). Stages of `weight_gradient` count the load of the row numbers too: five are
# two blocks in flight. `down_backward` spills 16 bytes per thread so that two programs fit, and gains a third by it.
_HOPPER_MANY_ROWS = Tiles(
    gate_up=Tile(128, 128, 64, 8, 3, uses_descriptor=True),
    down=Tile(128, 256, 64, 8, 4, uses_descriptor=True),
    down_backward=Tile(128, 128, 64, 8, 3, max_registers=128, uses_descriptor=True),
    input_gradient=Tile(128, 256, 64, 8, 3, uses_descriptor=True),
    weight_gradient=Tile(128, 256, 64, 8, 5),
)
_BLACKWELL_MANY_ROWS = Tiles(
    gate_up=Tile(128, 128, 64, 8, 3),
    down=Tile(128, 256, 64, 8, 3),
    down_backward=Tile(128, 64, 64, 8, 4),
    input_gradient=Tile(128, 256, 64, 8, 3),
    weight_gradient=Tile(128, 256, 64, 8, 3),
)
_AMPERE_MANY_ROWS = Tiles(
    gate_up=Tile(128, 64, 32, 8, 4),
    down=Tile(128, 128, 32, 8, 4),
    down_backward=Tile(128, 64, 32, 8, 4),
    input_gradient=Tile(128, 128, 32, 8, 4),
    weight_gradient=Tile(128, 128, 32, 8, 4),
)
_CDNA_MANY_ROWS = Tiles(
    gate_up=Tile(128, 64, 32, 8, 2),
    down=Tile(128, 128, 32, 8, 2),
    down_backward=Tile(128, 64, 32, 8, 2),
    input_gradient=Tile(128, 128, 32, 8, 2),
    weight_gradient=Tile(128, 128, 32, 8, 2),
)
_TWO_STAGE_FEW_ROWS = Tiles(
    gate_up=Tile(16, 64, 64, 4, 2),
    down=Tile(16, 64, 64, 4, 2),
    down_backward=Tile(16, 64, 64, 4, 2),
    input_gradient=Tile(16, 64, 64, 4, 2),
    weight_gradient=Tile(64, 64, 32, 4, 2),
)

# (family, H, I, bucket) -> tiles; H = I = ANY stands for all sizes.
_BY_ROWS = {
    "sm_80": (_TWO_STAGE_FEW_ROWS, SAFE, _AMPERE_MANY_ROWS),
    "sm_90": (_FEW_ROWS, _HOPPER_SOME_ROWS, _HOPPER_MANY_ROWS),
    "sm_100": (_FEW_ROWS, _HOPPER_SOME_ROWS, _BLACKWELL_MANY_ROWS),
    "gfx942": (_TWO_STAGE_FEW_ROWS, SAFE, _CDNA_MANY_ROWS),
}
SHIPPED = {(family, ANY, ANY, row): tiles for family, by_rows in _BY_ROWS.items() for row, tiles in enumerate(by_rows)}
# What each family of the table compiles for: Triton backend, architecture, threads a warp.
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# By major compute capability: shared memory a program may have at least, and the family whose tiles then fit. Not by
# name: H20, H800 and B300 are of these families as well, and later cards will be.
_FAMILIES = {
    8: (101376, "sm_80"),
    9: (232448, "sm_90"),
    10: (232448, "sm_100"),
    11: (101376, "sm_80"),
    12: (101376, "sm_80"),
}
_AMD_FAMILIES = {"gfx942": "gfx942", "gfx950": "gfx942"}
# Below, Triton orders no copy before a product that reads it asynchronously; on sm_100 results then change between
# runs (https://github.com/pytorch/pytorch/issues/181248), on sm_90 they have not been seen to.
_FENCED_TRITON = (3, 8)
INTERPRETER = "interpreter"
# Under the interpreter every step costs milliseconds, whatever its size: small tiles keep odd shapes interesting.
INTERPRETED = Tiles(
    gate_up=Tile(16, 16, 16, 1, 1),
    down=Tile(16, 16, 16, 1, 1),
    down_backward=Tile(16, 32, 16, 1, 1, group_m=2),
    input_gradient=Tile(16, 16, 16, 1, 1),
    weight_gradient=Tile(16, 16, 16, 1, 1),
)


def row_bucket(num_rows: int, num_experts: int) -> int:
    """Return the bucket of the mean number of rows per expert.

    Args:
        num_rows: S.
        num_experts: E.
    """
    mean = num_rows / num_experts
    return next((i for i, upper in enumerate(ROW_BUCKETS) if mean <= upper), len(ROW_BUCKETS))


def choose_tiles(device: torch.device, hidden: int, width: int, bucket: int, dtype: torch.dtype) -> Tiles:
    """Return the tiles for a shape on a device: tuned, shipped or safe, in this order.

    Args:
        device: Where the tensors are; a CPU means the interpreter.
        hidden: H.
        width: I.
        bucket: From `row_bucket`.
        dtype: Of the operands.
    """
    tiles = _choose(device_name(device), device_family(device), hidden, width, bucket)
    return tiles if device.type == "cpu" else tiles.for_dtype(dtype)


def device_name(device: torch.device) -> str:
    """Return the name under which tiles are kept: torch's for a GPU, ``interpreter`` for a CPU.

    Args:
        device: Where the tensors are.
    """
    return INTERPRETER if device.type == "cpu" else _name_of_gpu(device.index or 0)


@functools.lru_cache(maxsize=64)
def _name_of_gpu(index: int) -> str:
    return torch.cuda.get_device_name(index)


def device_family(device: torch.device) -> str | None:
    """Return the family of `TARGETS` whose tiles this device runs, by what it can do; None if it is none of them.

    Args:
        device: Where the tensors are; a CPU is of no family.

    Raises:
        ValueError: The installed Triton compiles products for this device that can read memory too early.
    """
    return None if device.type == "cpu" else _family_of_gpu(device.index or 0)


@functools.lru_cache(maxsize=64)
def _family_of_gpu(index: int) -> str | None:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return _AMD_FAMILIES.get(properties.gcnArchName.split(":")[0])
    return find_family(properties.major, properties.shared_memory_per_block_optin, triton.__version__)


def find_family(major: int, shared: int, triton_version: str) -> str | None:
    """Return the family of an NVIDIA GPU.

    Args:
        major: First number of its compute capability.
        shared: Bytes of shared memory that a program may have.
        triton_version: As Triton spells it.

    Raises:
        ValueError: As in `device_family`.
    """
    version = tuple(int(part) for part in triton_version.split(".")[:2])
    if major == 10 and version < _FENCED_TRITON:
        needed = ".".join(map(str, _FENCED_TRITON))
        raise ValueError(f"triton: got {triton_version}, expected {needed} or newer on compute capability {major}.x")
    least, family = _FAMILIES.get(major, (0, None))
    return family if shared >= least else None


@functools.lru_cache(maxsize=1024)
def _choose(device_name: str, family: str | None, hidden: int, width: int, bucket: int) -> Tiles:
    tuned = load_tuned().get((device_name, hidden, width, bucket))
    if tuned is not None:
        return tuned
    if device_name == INTERPRETER:
        return INTERPRETED
    if family is None:
        _log_unknown(device_name)
        return SAFE
    return SHIPPED.get((family, hidden, width, bucket), SHIPPED[family, ANY, ANY, bucket])


@functools.lru_cache(maxsize=64)
def _log_unknown(device_name: str) -> None:
    logger.warning(
        "fused_moe: %s is not in the tile table; using small safe tiles (docs/kernels.md, Tiles)",
        device_name,
    )


def tuned_path() -> Path:
    """Return the file of this user's own tuning results."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepseek-moe" / "tiles.json"


def load_tuned() -> dict[tuple[str, int, int, int], Tiles]:
    """Return the tuned tiles by (device name, H, I, bucket); empty if there are none, or the file is not usable."""
    path = tuned_path()
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {(e["device"], e["hidden"], e["width"], e["bucket"]): _read_tiles(e["tiles"]) for e in entries}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log_unusable(path, f"{type(error).__name__}: {error}")
        return {}


@functools.lru_cache(maxsize=64)
def _log_unusable(path: Path, reason: str) -> None:
    logger.warning("fused_moe: %s is not usable (%s) and left out", path, reason)


def _read_tiles(entry: dict[str, Any]) -> Tiles:
    """Read one entry; a size that no kernel can have is a ValueError, for it might run, and compute wrongly."""
    tiles = Tiles(**{name: Tile(**sizes) for name, sizes in entry.items()})
    for field in dataclasses.fields(tiles):
        tile = getattr(tiles, field.name)
        if type(tile.uses_descriptor) is not bool:
            raise ValueError(f"{field.name}.uses_descriptor: got {tile.uses_descriptor!r}, expected true or false")
        for name, low, high in (
            ("block_m", 16, 256),
            ("block_n", 16, 256),
            ("block_k", 16, 256),
            ("num_warps", 1, 16),
            ("num_stages", 1, 8),
            ("group_m", 1, 64),
            ("max_registers", 0, 255),
        ):
            got = getattr(tile, name)
            is_power = name in ("num_stages", "max_registers") or (isinstance(got, int) and got & (got - 1) == 0)
            if type(got) is not int or not low <= got <= high or not is_power:
                raise ValueError(f"{field.name}.{name}: got {got!r}, expected {low} to {high}")
    heights = {getattr(tiles, name).block_m for name in ROW_KERNELS}
    if len(heights) > 1:
        raise ValueError(f"block_m: got {sorted(heights)}, expected the same for {', '.join(ROW_KERNELS)}")
    return tiles


def save_tuned(device_name: str, hidden: int, width: int, bucket: int, tiles: Tiles) -> Path:
    """Add one result to this user's file and return its path.

    Args:
        device_name: From `device_name`.
        hidden: H.
        width: I.
        bucket: From `row_bucket`.
        tiles: What was fastest.
    """
    entries = {**load_tuned(), (device_name, hidden, width, bucket): tiles}
    rows = [
        {"device": d, "hidden": h, "width": w, "bucket": b, "tiles": dataclasses.asdict(t)}
        for (d, h, w, b), t in entries.items()
    ]
    path = tuned_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.partial")
    temporary.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    os.replace(temporary, path)
    _choose.cache_clear()
    return path


def matmul_precision(dtype: torch.dtype) -> str:
    """Return Triton's name for what torch lets products of this dtype do: ``tf32`` or ``ieee``.

    Torch has two interfaces for this, and raises where the older one is read after the newer one was
    used (``TrainingArguments(tf32=True)`` uses it). The newer one knows what was set by either. Other dtypes than fp32
    do not ask: their kernels must not be compiled again when the setting changes.
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
