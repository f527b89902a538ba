"""One expert's matrix in int4 times a few rows on a CPU: read into a dense buffer, or by torch's packed product.

    python -m deepseek_cli.benchmarks.four_bit_rows

Torch's product takes a packing of its own, across the outputs, so it needs a second copy of the codes. What that is,
in bytes, and milliseconds of both ways in turn by one thread are printed.
"""

import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_kernels.four_bit import FourBitFormat, PackedMatrices

SHAPES = ((1536, 2048), (2048, 768))
GROUPS = (32, 128)
ROWS = (1, 2, 4, 8, 16)
NUM_EXPERTS, NUM_ROUNDS = 16, 24


def make(height: int, width: int, group_size: int) -> PackedMatrices:
    """Return random experts in int4.

    Args:
        height: M.
        width: N.
        group_size: Weights that share a scale.
    """
    fmt, shape = FourBitFormat.of(4, "int4", group_size), (NUM_EXPERTS, height, width)
    codes, scales = fmt.empty(shape, torch.bfloat16, "cpu")
    for expert in range(NUM_EXPERTS):
        fmt.quantize_into(torch.randn(height, width).to(torch.bfloat16), codes[expert], scales[expert])
    return PackedMatrices(codes, scales, shape, fmt, torch.bfloat16)


def repack(packed: PackedMatrices, expert: int) -> tuple[Tensor, Tensor]:
    """Return one expert's codes and scales as torch's product takes them.

    Args:
        packed: [E, M, N].
        expert: Which.
    """
    codes = (packed.codes[expert].unsqueeze(2) >> 4 * torch.arange(8)) & 15
    scales = packed.scales[expert].T
    turned = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.flatten(1).int(), 1)
    return turned, torch.stack([scales, torch.zeros_like(scales)], dim=2).contiguous()


def measure(steps: dict[str, Callable[[int], object]]) -> dict[str, float]:
    """Return the median milliseconds of each step, all in turn, every round with another expert.

    Args:
        steps: Functions of the expert.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(NUM_ROUNDS):
        for name in random.sample(list(steps), len(steps)):
            begun = time.perf_counter()
            steps[name](turn % NUM_EXPERTS)
            samples[name].append(1e3 * (time.perf_counter() - begun))
    return {name: statistics.median(times) for name, times in samples.items()}


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    for group_size in GROUPS:
        for height, width in SHAPES:
            packed = make(height, width, group_size)
            begun = time.perf_counter()
            copies = [repack(packed, expert) for expert in range(NUM_EXPERTS)]
            milliseconds = 1e3 * (time.perf_counter() - begun) / NUM_EXPERTS
            num_bytes = sum(t.numel() * t.element_size() for t in copies[0]) / (height * width)
            print(f"group {group_size}, {height} x {width}: repacked in {milliseconds:.1f} ms", end=", ")
            print(f"{num_bytes:.3f} bytes per weight more")
            for num_rows in ROWS:
                x = torch.randn(num_rows, width).to(torch.bfloat16)

                def by_buffer(expert: int, x: Tensor = x, packed: PackedMatrices = packed) -> Tensor:
                    return F.linear(x, packed[expert])

                def by_codes(
                    expert: int, x: Tensor = x, copies: list[tuple[Tensor, Tensor]] = copies, group: int = group_size
                ) -> Tensor:
                    return multiply(x, copies[expert][0], group, copies[expert][1])

                times = measure({"buffer": by_buffer, "packed": by_codes})
                ratio = times["buffer"] / times["packed"]
                print(f"  rows {num_rows}: {times['buffer']:.2f} and {times['packed']:.3f} ms, {ratio:.1f} times")


if __name__ == "__main__":
    main()
