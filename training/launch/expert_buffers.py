"""What layers of experts take in a training's backward pass beside what autograd keeps.

A layer's gradients lie there once more before they are added to those of an earlier pass, and the products need rows
of their own. On a CPU the fused experts take large buffers in pages of 2 MiB, from a pool that keeps what is idle
(`deepseek_kernels.cpu.large_buffers`): what a pass has taken is still there when the optimizer steps.
"""

import sys
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from deepseek_kernels.cpu import large_buffers, staged
from modeling_deepseek.families import find_moe_layers

_FP32 = 4


@dataclass(frozen=True)
class ExpertBuffers:
    """Bytes of one pass beside what autograd keeps.

    Attributes:
        pages: By which kept pre-activations and the experts' gradients are larger in whole pages.
        pooled: From the pool, of the layer that takes most: its gradients before they are added, rows of its products.
        passing: Of the same, what goes as it came; the loss's memory is free again by then.
        idle: What the pool still holds while the optimizer steps; at most its limit.
    """

    pages: float
    pooled: float
    passing: float
    idle: float


def count_buffers(
    model: PreTrainedModel, num_tokens: int, *, is_bf16: bool, is_checkpointed: bool, is_accumulated: bool
) -> ExpertBuffers:
    """Return what a model's layers of experts take.

    Args:
        model: On any device; without experts, its largest gradient counts alone.
        num_tokens: Of one forward pass.
        is_bf16: Whether passes run under bf16 autocast.
        is_checkpointed: Whether activations are computed again, one layer at a time.
        is_accumulated: Whether an optimizer step has more than one pass.
    """
    config = model.config.get_text_config()
    least = large_buffers.MIN_BYTES
    if torch.cuda.is_available() or getattr(config, "_experts_implementation", None) != "fused_moe":
        least = sys.maxsize  # no pool
    slots = int(getattr(config, "num_experts_per_tok", None) or 1)
    # The router varies the number of experts per token; rows are made for those alone.
    used = round(num_tokens * float(getattr(config, "target_experts_per_tok", None) or slots))
    largest = max((parameter.numel() for parameter in model.parameters() if parameter.requires_grad), default=0)
    pages, kept, working = 0.0, [0.0], (0.0, _FP32 * largest * float(is_accumulated))
    for layer in find_moe_layers(model):
        down = getattr(layer.experts, "down_proj", None)
        if layer.experts is None or not isinstance(down, torch.Tensor) or down.dim() != 3:
            continue
        num_experts, hidden, width = down.shape
        if getattr(layer.experts, "is_transposed", False):
            hidden, width = width, hidden
        moved = [parameter.numel() for parameter in layer.experts.parameters() if parameter.requires_grad]
        dtype = torch.bfloat16 if is_bf16 else down.dtype
        gradients = [float(size * dtype.itemsize) for size in moved]
        preactivation = float(num_tokens * slots * 2 * width * dtype.itemsize)
        in_pages = _in_pages(preactivation, least) or preactivation
        pages += (in_pages - preactivation) * (not is_checkpointed)
        if not is_bf16:  # gradients that are cast are torch's own
            pages += sum(_in_pages(size, least) - size for size in gradients if size >= least)
        kept.append(_in_pages(preactivation, least))
        rows = used
        if least < sys.maxsize and not staged.is_small(num_tokens * slots, hidden, width, dtype):
            rows = used // num_experts
        sizes = [*_row_bytes(rows, hidden, width, dtype.itemsize), *(gradients if is_accumulated or is_bf16 else ())]
        pooled = sum(_in_pages(size, least) for size in sizes)
        passing = sum(size for size in sizes if size < least)
        if is_bf16:  # casts of pre-activation and gradients
            passing += rows * 3 * width * _FP32 + rows * 2 * width * dtype.itemsize
            passing += _FP32 * sum(moved) * is_accumulated
        working = max(working, (pooled, passing), key=sum)
    held = (max(kept) if is_checkpointed else sum(kept)) + working[0]
    return ExpertBuffers(pages, *working, min(held, large_buffers.MAX_IDLE_BYTES))


def _row_bytes(rows: int, hidden: int, width: int, itemsize: int) -> list[float]:
    """Of each buffer of the backward pass: two of the hidden width, five of the experts', of these four in fp32."""
    buffers = [rows * hidden * itemsize, (rows + 1) * hidden * itemsize, rows * width * itemsize]
    return [float(size) for size in (*buffers, *([rows * width * _FP32] * 2), rows * 2 * width * _FP32)]


def _in_pages(num_bytes: float, least: int) -> float:
    """What the pool takes from the system, 0 for what is too small for it."""
    page = large_buffers.PAGE_BYTES
    return 0.0 if num_bytes < least else -(-num_bytes // page) * page
