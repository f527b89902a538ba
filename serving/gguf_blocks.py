"""int4 experts as llama.cpp's Q4_0 blocks: the same codes, ordered as ggml keeps them.

A block is 32 weights: their scale in fp16, then 16 bytes with weight i in the low half and weight i + 16 in the high
one; both formats take a code less 8 times the scale. `gguf_export` calls it.
"""

import torch
from torch import Tensor

GROUP_SIZE = 32


def q4_0_blocks(packed: Tensor, scales: Tensor) -> Tensor:
    """Return `[M, N / 32 * 18]` bytes.

    Args:
        packed: `[M, N / 8]` int32, eight codes along the input, lowest bits first, offset 8.
        scales: `[M, N / 32]`; fp32 ones are rounded to fp16, bf16 ones in its range are kept as they are.

    Raises:
        ValueError: Another group, or a scale that fp16 cannot hold.
    """
    rows, groups = scales.shape
    if packed.shape != (rows, groups * GROUP_SIZE // 8):
        got = f"codes {tuple(packed.shape)} and scales {tuple(scales.shape)}"
        raise ValueError(f"model: got {got}, expected groups of {GROUP_SIZE} for Q4_0")
    halves = scales.to(torch.float16)
    if not halves.isfinite().all():
        raise ValueError("model: got a scale above 65504, which fp16 cannot hold, expected smaller ones for Q4_0")
    places = torch.arange(0, 32, 4)
    codes = (packed.unsqueeze(-1) >> places & 15).to(torch.uint8).view(rows, groups, 2, GROUP_SIZE // 2)
    nibbles = codes[:, :, 0] | codes[:, :, 1] << 4
    blocks = torch.cat([halves.unsqueeze(-1).view(torch.uint8), nibbles], dim=2)
    return blocks.reshape(rows, groups * (2 + GROUP_SIZE // 2))
