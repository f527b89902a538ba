"""The epilogue of an expert inside Triton kernels: see ``epilogue.Epilogue``, of which this is the device's side.

Every branch is decided at compile time; of the plain form nothing is left but activation and product. Comparisons are
written so that NaN passes the clamps.
"""

import dataclasses
import functools
from typing import Any

import triton
import triton.language as tl

from deepseek_kernels.epilogue import Epilogue
from deepseek_kernels.gpu.tiles import Tile
from deepseek_kernels.gpu.triton_numerics import activate

# Columns a block, found by compiling for sm_90 and sm_100.
_NARROW = 64


def epilogue_constants(activation: str) -> dict[str, Any]:
    """Return the compile-time arguments of an epilogue.

    Args:
        activation: Text of the epilogue.
    """
    epilogue = Epilogue.read(activation)
    return {
        "ACTIVATION": epilogue.activation,
        "LIMIT": epilogue.limit,
        "ALPHA": epilogue.alpha,
        "SHIFT": epilogue.shift,
        "INTERLEAVED": epilogue.is_interleaved,
    }


@functools.lru_cache(maxsize=256)
def forward_tile(tile: Tile, activation: str) -> Tile:
    """Return the tile for ``gate_up``: interleaved columns are stored by twos, and spill where a block is wide.

    Args:
        tile: As chosen for the plain epilogue.
        activation: Text of the epilogue.
    """
    if Epilogue.read(activation).is_interleaved:
        return dataclasses.replace(tile, block_n=min(tile.block_n, _NARROW))
    return tile


@functools.lru_cache(maxsize=256)
def backward_tile(tile: Tile, activation: str) -> Tile:
    """Return the tile for ``down_backward``: whatever is not plain takes registers that a wide block does not have.

    Args:
        tile: As chosen for the plain epilogue.
        activation: Text of the epilogue.
    """
    if Epilogue.read(activation).is_plain:
        return tile
    return dataclasses.replace(tile, block_n=min(tile.block_n, _NARROW), max_registers=0)


@triton.jit
def _bounded_gate(gate, LIMIT: tl.constexpr):
    if LIMIT is not None:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
    return gate


@triton.jit
def _bounded_up(up, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    if LIMIT is not None:
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    if SHIFT != 0:
        up += SHIFT
    return up


@triton.jit
def _activated(gate, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """Activation and derivative of a bounded gate."""
    if ALPHA == 1:
        return activate(gate, ACTIVATION)
    activated, slope = activate(gate * ALPHA, ACTIVATION)
    return activated / ALPHA, slope


@triton.jit
def gated(
    gate,
    up,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    SHIFT: tl.constexpr,
    ACC: tl.constexpr,
):
    """What the second product multiplies, from rounded gate and up, in `ACC`."""
    activated, _ = _activated(_bounded_gate(gate.to(ACC), LIMIT), ACTIVATION, ALPHA)
    return activated * _bounded_up(up.to(ACC), LIMIT, SHIFT)


@triton.jit
def gated_slopes(
    gate,
    up,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Activation, its derivative and up, all after the clamps; the derivative is 0 where the gate's clamp holds."""
    activated, slope = _activated(_bounded_gate(gate, LIMIT), ACTIVATION, ALPHA)
    if LIMIT is not None:
        slope = tl.where(gate <= LIMIT, slope, 0.0)
    return activated, slope, _bounded_up(up, LIMIT, SHIFT)


@triton.jit
def through_clamp(grad_up, up, LIMIT: tl.constexpr):
    """The gradient of up, 0 where its clamp holds."""
    if LIMIT is not None:
        grad_up = tl.where(tl.abs(up) <= LIMIT, grad_up, 0.0)
    return grad_up
