"""`fused_moe_fp8`: the experts with FP8 products where that pays, after DeepSeek-V3.

Forward and input gradients multiply in FP8, weight gradients in the operands' own type: on Hopper an FP8 weight
gradient is slower than a bf16 one. On a CPU the codes are those of a GPU, so what FP8 costs in accuracy can be
measured without one. A GPU without FP8 products is refused rather than given something else.

T tokens, K slots per token, H hidden, I expert width, E experts.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from deepseek_kernels.cpu import fp8_experts
from deepseek_kernels.epilogue import Epilogue, epilogue_text
from deepseek_kernels.fp8 import FP8
from deepseek_kernels.fused_moe import _check, _check_biases
from deepseek_kernels.gpu.device_guard import on_device_of
from deepseek_kernels.routed_bias import routed_bias
from deepseek_kernels.slot_order import SlotOrder
from deepseek_kernels.triton_path import runs_triton

try:
    from deepseek_kernels.gpu import fp8_experts as fp8_experts_gpu
except ImportError:  # no Triton on this system; the CPU path needs none
    fp8_experts_gpu = None  # type: ignore[assignment]

# The first GPUs with FP8 products: Ada, then Hopper.
_LEAST_CAPABILITY = (8, 9)


def fused_moe_fp8(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_indices: Tensor,
    topk_weights: Tensor,
    *,
    activation: str | Epilogue = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
    block: tuple[int, int] = (128, 128),
) -> Tensor:
    """Return what `fused_moe` returns, with FP8 products.

    Args:
        hidden_states: [T, H]; float32, bfloat16 or float16.
        gate_up_proj: [E, 2I, H], gate rows before up rows; contiguous, dtype of `hidden_states`, or FP8 codes with
            scales, which are frozen.
        down_proj: [E, H, I]; likewise.
        topk_indices: [T, K]; at or above E means unused.
        topk_weights: [T, K].
        activation: As in `fused_moe`; the weights may not be interleaved.
        gate_up_bias: [E, 2I].
        down_bias: [E, H].
        gate_up_scales: [E, ceil(2I / block rows), ceil(H / block columns)], of FP8 codes.
        down_scales: [E, ceil(H / block rows), ceil(I / block columns)], of FP8 codes.
        block: Rows and columns that one scale is for.

    Raises:
        ValueError: As `fused_moe`, and where FP8 cannot be had.

    Reference: DeepSeek-AI 2024, arXiv 2412.19437, section 3.3; weight gradients stay in bf16 here.
    """
    check_device(hidden_states.device, hidden_states.dtype)
    text = epilogue_text(activation)
    _check_precision(hidden_states, Epilogue.read(text))
    scales = (gate_up_scales, down_scales)
    _check_scales((gate_up_proj, down_proj), scales, block)
    projections = (gate_up_proj, down_proj)
    if gate_up_scales is not None:  # Shapes alone: nothing is written, so nothing is taken.
        projections = tuple(torch.empty_like(codes, dtype=hidden_states.dtype) for codes in projections)
    _check(hidden_states, *projections, topk_indices, topk_weights)
    _check_biases(*projections, gate_up_bias, down_bias)
    if runs_triton(hidden_states):
        fp8_experts_gpu.check_weights(fp8_experts.Weights(gate_up_proj, down_proj, *scales, block))
    x, indices, weights = hidden_states.contiguous(), topk_indices.contiguous(), topk_weights.contiguous()
    bias = None if gate_up_bias is None else gate_up_bias.contiguous()
    floats = (x, gate_up_proj, down_proj, weights, *(() if bias is None else (bias,)))
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in floats)
    output = _Fp8Experts.apply(x, gate_up_proj, down_proj, indices, weights, bias, text, *scales, block, keep)
    return output if down_bias is None else output + routed_bias(down_bias, topk_indices, weights)


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Raise a ValueError where FP8 experts cannot run.

    Args:
        device: Of the tensors.
        dtype: Of the activations.
    """
    if device.type == "cpu":
        return
    where = f"experts_implementation: got fused_moe_fp8 on {device.type}"
    if device.type != "cuda" or torch.version.hip is not None or fp8_experts_gpu is None:
        where = where if torch.version.hip is None else f"{where} of AMD, whose FP8 is another"
        raise ValueError(f"{where}, expected cpu, or an NVIDIA GPU with Triton; use fused_moe")
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        version = ".".join(map(str, capability))
        raise ValueError(f"{where}, compute capability {version}, expected 8.9 or later; use fused_moe")
    if dtype == torch.float32:
        raise ValueError(f"{where} with float32 weights, expected bfloat16; use fused_moe")


def _check_precision(hidden_states: Tensor, epilogue: Epilogue) -> None:
    if hidden_states.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"hidden_states: got dtype {hidden_states.dtype}, expected float32, bfloat16 or float16")
    if epilogue.is_interleaved:
        raise ValueError("is_interleaved: got True with FP8, expected gates before ups, which share no block of 128")


def _check_scales(
    projections: tuple[Tensor, Tensor], scales: tuple[Tensor | None, Tensor | None], block: tuple[int, int]
) -> None:
    """Raise a ValueError where codes and scales do not belong together."""

    def wrong(name: str, got: object, fits: object) -> NoReturn:
        raise ValueError(f"{name}: got {got}, expected {fits}")

    if len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block):
        wrong("block", block, "two whole numbers above 0")
    for name, weights, scale in zip(("gate_up", "down"), projections, scales, strict=True):
        if (weights.dtype == FP8) != (scale is not None):
            kind = "FP8 codes without scales" if scale is None else f"{weights.dtype} with scales"
            wrong(f"{name}_scales", kind, "both or neither")
        if (scale is None) != (scales[0] is None):
            wrong("down_scales", "scales of one projection only", "of both or of neither")
        if scale is not None and weights.dim() == 3:
            sizes = (-(-size // step) for size, step in zip(weights.shape[1:], block, strict=True))
            wanted = (weights.shape[0], *sizes)
            if tuple(scale.shape) != wanted:
                wrong(f"{name}_scales", f"shape {tuple(scale.shape)}", f"{wanted} for blocks of {block}")


def _module_for(tensor: Tensor) -> Any:
    """What computes on this tensor's device: three functions of the same names and meanings."""
    return fp8_experts_gpu if runs_triton(tensor) else fp8_experts


class _Fp8Experts(torch.autograd.Function):
    """Keeps what `fused_moe` keeps: the input, the pre-activation and integers. Weights are rounded anew each time."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, gate_up, down, indices, topk_weights, bias, text, gate_up_scales, down_scales, block, keep = inputs
        weights = fp8_experts.Weights(gate_up, down, gate_up_scales, down_scales, block)
        module = _module_for(x)
        with on_device_of(x):
            order = module.route(indices, gate_up.shape[0])
            output, preactivation = module.forward(x, weights, order, topk_weights, text, bias, keep)
        ctx.save_for_backward(
            x, gate_up, down, topk_weights, gate_up_scales, down_scales, preactivation, *order.tensors()
        )
        ctx.text, ctx.block = text, block
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, topk_weights, gate_up_scales, down_scales, preactivation, *order = ctx.saved_tensors
        weights = fp8_experts.Weights(gate_up, down, gate_up_scales, down_scales, ctx.block)
        is_frozen = gate_up_scales is not None  # whatever the codes say of themselves
        needs = tuple(ctx.needs_input_grad[i] and not (is_frozen and i in (1, 2)) for i in (0, 1, 2, 4, 5))
        with on_device_of(x):
            grad_x, grad_gate_up, grad_down, grad_weights, grad_bias = _module_for(x).backward(
                grad_output.contiguous(), x, weights, SlotOrder(*order), topk_weights, preactivation, ctx.text, needs
            )
        return grad_x, grad_gate_up, grad_down, None, grad_weights, grad_bias, *(None,) * 5
