"""Experts' matrices in 4 bits: NF4 as bitsandbytes writes it, int4 as compressed-tensors packs it, and reading both.

A stack `[E, M, N]` becomes codes and scales; `PackedMatrices` gives one expert's matrix at a time, in a buffer that
the next one overwrites. The paths of `fused_moe` index a stack by expert, so they take either.

    nf4     codes [E, M * N / 2] uint8, the earlier of two in the high half; scales [E, M * N / group]: the largest
            magnitude of each group
    int4    codes [E, M, N / 8] int32, eight along the input, lowest bits first, offset 8; scales [E, M, N / group]:
            the largest magnitude over 7.5

E experts, M outputs, N inputs.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Dettmers et al. 2023 (arXiv 2305.14314), appendix E; bitsandbytes' functional.py holds the same numbers.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
GROUP_SIZES = {"nf4": 64, "int4": 128}
_TINY = 1e-12


@dataclass
class FourBitFormat:
    """How a stack is stored.

    Attributes:
        name: ``nf4`` or ``int4``.
        group_size: Weights that share a scale.
    """

    name: str
    group_size: int

    @classmethod
    def of(cls, bits: int, name: str, group_size: int | None) -> "FourBitFormat":
        """Return the format of these settings.

        Args:
            bits: 4.
            name: ``nf4`` or ``int4``.
            group_size: None for the format's own, 64 and 128.

        Raises:
            ValueError: There is no such format.
        """
        if bits != 4:
            raise ValueError(f"bits: got {bits!r}, expected 4")
        if name not in GROUP_SIZES:
            raise ValueError(f"format: got {name!r}, expected one of {', '.join(GROUP_SIZES)}")
        group_size = GROUP_SIZES[name] if group_size is None else group_size
        if group_size < 8 or group_size % 8:
            raise ValueError(f"group_size: got {group_size}, expected a multiple of 8")
        return cls(name, group_size)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise a ValueError where a stack of this shape cannot be stored.

        Args:
            name: Of the stack.
            shape: [E, M, N].
        """
        length = shape[2] if self.name == "int4" else shape[1] * shape[2]
        if length % self.group_size:
            what = "inputs" if self.name == "int4" else "weights per expert"
            raise ValueError(f"group_size: got {self.group_size}, expected a divisor of {name}'s {length} {what}")

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> tuple[Tensor, Tensor]:
        """Return codes and scales still to be filled.

        Args:
            shape: [E, M, N].
            dtype: Of the weights; NF4 keeps its scales in bfloat16, so as not to spend a tenth of the memory on them.
            device: Where.
        """
        codes, scales = self.shapes(shape)
        dtypes = (torch.uint8, torch.bfloat16) if self.name == "nf4" else (torch.int32, dtype)
        return torch.empty(codes, dtype=dtypes[0], device=device), torch.empty(scales, dtype=dtypes[1], device=device)

    def shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of codes and scales.

        Args:
            shape: [E, M, N].
        """
        num_experts, height, width = shape
        if self.name == "nf4":
            return (num_experts, height * width // 2), (num_experts, height * width // self.group_size)
        return (num_experts, height, width // 8), (num_experts, height, width // self.group_size)

    def quantize_into(self, matrix: Tensor, codes: Tensor, scales: Tensor, given: Tensor | None = None) -> None:
        """Write one expert's codes and scales.

        Args:
            matrix: [M, N].
            codes: As from `empty`, of one expert.
            scales: As from `empty`, of one expert.
            given: Scales [M, N / group] to round by, of int4; None: of the largest magnitudes.
        """
        if self.name == "nf4":
            assert given is None, "NF4 rounds by the largest magnitudes"
            found = quantize_nf4(matrix, self.group_size)
        else:
            found = quantize_int4(matrix, self.group_size, given)
        for target, source in zip((codes, scales), found, strict=True):
            target.copy_(source.view(target.shape))


def quantize_nf4(matrix: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return bitsandbytes' NF4 codes, two a byte, and the largest magnitude of each group in float32.

    Args:
        matrix: Any shape; groups run over it flat.
        group_size: Divides its elements.

    Raises:
        ValueError: It does not.
    """
    _check_group(group_size, matrix.numel(), "weights")
    groups = matrix.detach().float().reshape(-1, group_size)
    largest = groups.abs().amax(1)
    scaled = (groups * (1.0 / largest.clamp(min=1e-38)).unsqueeze(1)).clamp(-1, 1)
    values = torch.tensor(NF4, device=matrix.device)
    nearest = torch.bucketize(scaled.flatten(), (values[1:] + values[:-1]) / 2).to(torch.uint8)
    return nearest[::2] << 4 | nearest[1::2], largest


def quantize_int4(matrix: Tensor, group_size: int, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return symmetric codes in compressed-tensors' packing and the scales, in the matrix's dtype.

    Args:
        matrix: [M, N].
        group_size: Divides N; a multiple of 8.
        scales: [M, N / group] to round by; None: each group's largest magnitude over 7.5.

    Raises:
        ValueError: It does not.
    """
    _check_group(group_size, matrix.shape[-1], "inputs")
    groups = matrix.detach().reshape(matrix.shape[0], -1, group_size)
    if scales is None:
        scales = (groups.abs().amax(2).float() / 7.5).clamp(min=_TINY)
    scales = scales.to(matrix.dtype)
    codes = (groups.float() / scales.float().unsqueeze(2)).round().clamp(-8, 7).to(torch.int32) + 8
    eights = codes.view(matrix.shape[0], -1, 8)
    packed = torch.zeros(eights.shape[:2], dtype=torch.int32, device=matrix.device)
    for place in range(8):
        packed |= eights[:, :, place] << 4 * place
    return packed, scales


def _check_group(group_size: int, length: int, what: str) -> None:
    if group_size < 8 or group_size % 8 or length % group_size:
        raise ValueError(f"group_size: got {group_size}, expected a multiple of 8 that divides {length} {what}")


class PackedMatrices:
    """A stack `[E, M, N]` in 4 bits that is read like a tensor, one expert at a time.

    Args:
        codes: From `FourBitFormat.empty`, filled.
        scales: Likewise.
        shape: [E, M, N].
        fmt: The format.
        dtype: Of the matrices that are read.
    """

    def __init__(
        self, codes: Tensor, scales: Tensor, shape: tuple[int, ...], fmt: FourBitFormat, dtype: torch.dtype
    ) -> None:
        self.codes, self.scales, self.shape, self.format, self.dtype = codes, scales, shape, fmt, dtype
        self.requires_grad = False
        self._buffer: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the codes lie."""
        return self.codes.device

    def dim(self) -> int:
        """Return 3, as a tensor would."""
        return len(self.shape)

    def is_contiguous(self) -> bool:
        """Whether codes and scales lie one after another."""
        return self.codes.is_contiguous() and self.scales.is_contiguous()

    def to(self, dtype: torch.dtype) -> "PackedMatrices":
        """Return the same, to be read in another type.

        Args:
            dtype: A float type.
        """
        if dtype == self.dtype:
            return self
        return PackedMatrices(self.codes, self.scales, self.shape, self.format, dtype)

    def new_empty(self, *sizes: int) -> Tensor:
        """Return an empty tensor of the type read.

        Args:
            sizes: Of it.
        """
        return torch.empty(*sizes, dtype=self.dtype, device=self.device)

    def __getitem__(self, expert: int) -> Tensor:
        """One expert's matrix [M, N]; the next that is read overwrites it."""
        _, height, width = self.shape
        if self._buffer is None:
            self._buffer = torch.empty(height * width // 2, 2, dtype=torch.float32, device=self.device)
        pairs = self.codes[expert].view(torch.uint8).flatten()
        values = torch.index_select(_byte_table(self.format.name, self.device), 0, pairs.int(), out=self._buffer)
        groups = values.view(-1, self.format.group_size)
        groups.mul_(self.scales[expert].float().view(-1, 1))
        return groups.view(height, width).to(self.dtype)


@functools.lru_cache(maxsize=64)
def _byte_table(name: str, device: torch.device) -> Tensor:
    """The two values of each byte, [256, 2]; made once per device, for making it waits for a GPU."""
    byte = torch.arange(256, device=device)
    if name == "nf4":
        return torch.tensor(NF4, device=device)[torch.stack([byte >> 4, byte & 15], dim=1)]
    return (torch.stack([byte & 15, byte >> 4], dim=1) - 8).float()
