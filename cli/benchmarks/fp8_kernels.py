"""Every kernel of `fused_moe_fp8` alone, beside those of `fused_moe`, and the products of codes with other tiles.

``fp8_on_gpu`` calls it.

T tokens, H hidden, I expert width, E experts, K slots per token, S = T*K rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench

from deepseek_cli.benchmarks.fp8_layer import ACTIVATION, Layer, make_codes, teraflops
from deepseek_kernels.fp8 import GROUP
from deepseek_kernels.gpu import fp8_experts
from deepseek_kernels.gpu.combine import combine
from deepseek_kernels.gpu.down_backward import down_backward
from deepseek_kernels.gpu.fp8_down_backward import down_backward_fp8
from deepseek_kernels.gpu.fp8_gate_up import gate_up_fp8
from deepseek_kernels.gpu.fp8_grouped_gemm import grouped_gemm_fp8
from deepseek_kernels.gpu.fp8_quantize import activate_rows, quantize_halves, quantize_rows
from deepseek_kernels.gpu.fp8_tiles import MANY_ROWS, Fp8Tiles
from deepseek_kernels.gpu.gate_up import gate_up
from deepseek_kernels.gpu.grouped_gemm import grouped_gemm
from deepseek_kernels.gpu.routing_metadata import routing_metadata
from deepseek_kernels.gpu.tiles import SHIPPED, Tile
from deepseek_kernels.gpu.weight_gradient import weight_gradient

FAILURES = (OutOfResources, PTXASError, RuntimeError)
# The shipped tile is the first of each.
VARIANTS: dict[str, tuple[Tile, ...]] = {
    "gate_up": (
        MANY_ROWS.gate_up,
        Tile(64, 64, GROUP, 4, 4, uses_descriptor=True),
        Tile(64, 64, GROUP, 4, 3, group_m=16, uses_descriptor=True),
        Tile(64, 64, GROUP, 4, 3, max_registers=168, uses_descriptor=True),
        Tile(128, 64, GROUP, 8, 4, uses_descriptor=True),
    ),
    "down": (
        MANY_ROWS.down,
        Tile(64, 128, GROUP, 4, 4, group_m=32, uses_descriptor=True),
        Tile(64, 128, GROUP, 4, 3, group_m=16, uses_descriptor=True),
        Tile(64, 128, GROUP, 4, 3, uses_descriptor=True),
        Tile(64, 64, GROUP, 4, 4, uses_descriptor=True),
    ),
    "input_gradient": (
        MANY_ROWS.input_gradient,
        Tile(64, 128, GROUP, 4, 4, group_m=32, uses_descriptor=True),
        Tile(64, 128, GROUP, 4, 3, group_m=16, uses_descriptor=True),
        Tile(64, 128, GROUP, 4, 3, uses_descriptor=True),
        Tile(64, 64, GROUP, 4, 4, uses_descriptor=True),
    ),
    "down_backward": (
        MANY_ROWS.down_backward,
        Tile(64, 128, GROUP, 8, 4, uses_descriptor=True),
        Tile(64, 128, GROUP, 8, 3, group_m=16, uses_descriptor=True),
        Tile(64, 128, GROUP, 8, 3, group_m=32, uses_descriptor=True),
        Tile(64, 128, GROUP, 4, 3, uses_descriptor=True),
    ),
}


def kernels(layer: Layer, tiles: Fp8Tiles) -> dict[str, tuple[int, Callable[[], object]]]:
    """Return every kernel by name, with its number of products of S H I, and how to launch it.

    Args:
        layer: Its operands.
        tiles: Of the products of codes.
    """
    (num_tokens, hidden, width, num_experts, num_slots), bf16 = layer.shape, torch.bfloat16
    x, grad, weights, shares = layer.x, layer.grad, layer.weights, layer.topk_weights
    metadata = routing_metadata(layer.indices, num_experts, tiles.block_m)
    plain, turned = make_codes(weights)
    x_codes, grad_codes, used = quantize_rows(x), quantize_rows(grad), metadata.expert_start[-1:]
    h = _random_rows(x, num_tokens * num_slots, 2 * width)
    activated, halves = activate_rows(h, ACTIVATION, used), quantize_halves(h, used)
    a, y = h[:, :width].contiguous(), _random_rows(x, num_tokens * num_slots, hidden)
    form: dict[str, Any] = {"activation": ACTIVATION, "keep_preactivation": True}
    old = SHIPPED["sm_90", 0, 0, 2]
    of_bf16 = routing_metadata(layer.indices, num_experts, old.block_m)
    gathered = (of_bf16, num_slots, old.weight_gradient)
    return {
        "quantize x": (0, lambda: quantize_rows(x)),
        "quantize gate_up": (0, lambda: fp8_experts.gate_up_codes(weights)),
        "quantize gate_up, transposed": (0, lambda: fp8_experts.gate_up_codes(weights, transpose=True)),
        "quantize down": (0, lambda: fp8_experts.down_codes(weights)),
        "quantize down, transposed": (0, lambda: fp8_experts.down_codes(weights, transpose=True)),
        "activate_rows": (0, lambda: activate_rows(h, ACTIVATION, used)),
        "quantize dh": (0, lambda: quantize_halves(h, used)),
        "combine": (0, lambda: combine(y, metadata.slot_row, num_slots, shares)),
        "gate_up": (
            2,
            lambda: gate_up_fp8(x_codes, plain[0], metadata, num_slots, width, bf16, tiles.gate_up, **form),
        ),
        "down": (1, lambda: grouped_gemm_fp8(activated, plain[1], metadata, hidden, bf16, tiles.down)),
        "down_backward": (
            1,
            lambda: down_backward_fp8(grad_codes, turned[1], h, shares, metadata, ACTIVATION, tiles.down_backward),
        ),
        "input_gradient": (
            2,
            lambda: grouped_gemm_fp8(halves, turned[0], metadata, hidden, bf16, tiles.input_gradient),
        ),
        "bf16 gate_up": (
            2,
            lambda: gate_up(x, weights.gate_up, of_bf16, num_slots, ACTIVATION, True, old.gate_up),
        ),
        "bf16 down": (1, lambda: grouped_gemm(a, weights.down, of_bf16, old.down, transpose=True)),
        "bf16 down_backward": (
            1,
            lambda: down_backward(grad, weights.down, h, shares, of_bf16, ACTIVATION, old.down_backward),
        ),
        "bf16 input_gradient": (
            2,
            lambda: grouped_gemm(h, weights.gate_up, of_bf16, old.input_gradient, transpose=False),
        ),
        "bf16 weight_gradient, down": (1, lambda: weight_gradient(grad, a, *gathered, gather="left")),
        "bf16 weight_gradient, gate_up": (2, lambda: weight_gradient(h, x, *gathered, gather="right")),
    }


def _random_rows(x: Tensor, rows: int, columns: int) -> Tensor:
    """Numbers of order one; zeros would take less power, and less time. On a CPU nothing reads them."""
    made = x.new_empty(rows, columns)
    return made.normal_() if x.is_cuda else made


def measure_kernels(layer: Layer, milliseconds: int) -> list[dict[str, Any]]:
    """Return a row per kernel with the shipped tiles.

    Args:
        layer: Its operands.
        milliseconds: How long to time each.
    """
    found = kernels(layer, MANY_ROWS)
    return [_time_kernel(layer.shape, name, "", *found[name], milliseconds) for name in found]


def measure_variants(layer: Layer, milliseconds: int) -> list[dict[str, Any]]:
    """Return a row per tile of each product of codes; a narrow one of ``gate_up`` has `activate_rows` with it.

    Args:
        layer: Its operands.
        milliseconds: How long to time each.
    """
    rows = []
    for name, tiles in VARIANTS.items():
        for tile in tiles:
            found = kernels(layer, Fp8Tiles(tile, tile, tile, tile))
            rows.append(_time_kernel(layer.shape, name, str(tile), *found[name], milliseconds))
            del found
    return rows


def _time_kernel(
    shape: tuple[int, ...], name: str, tile: str, products: int, run: Callable[[], object], milliseconds: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"shape": shape, "kernel": name, "tile": tile}
    try:
        low, median, high = do_bench(run, warmup=5, rep=milliseconds, quantiles=[0.25, 0.5, 0.75])
        row |= {"ms": median, "ms_low": low, "ms_high": high}
        row["tflops"] = teraflops(shape, products, median)
    except FAILURES as error:
        row["failed"] = f"{type(error).__name__}: {error}"[:200]
    return row
