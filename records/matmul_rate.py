"""The rate of a large matrix product on this machine, of which training and the kernels' table state a share.

Measured rather than looked up: no table knows every CPU, and a shared machine gives less than its sheet says.
"""

import math
import time

import torch


def measure_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOPs per second of a large square product: the best of five.

    Args:
        device: Where to multiply.
        dtype: What to multiply in.
    """
    size = 8192 if device.type == "cuda" else 1024
    left = torch.randn(size, size, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
