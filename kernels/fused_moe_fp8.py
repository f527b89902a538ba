"""`fused_moe_fp8`: the experts with FP8 products where that pays, after DeepSeek-V3.

Forward and input gradients multiply in FP8, weight gradients in the operands' own type: on Hopper an FP8 weight
gradient is slower than a bf16 one. On a CPU the codes are those of a GPU, so what FP8 costs in accuracy can be
measured without one. A GPU without FP8 products is refused rather than given something else.

Low-rank adapters of frozen weights run beside the products as in ``lora``: what they add is not in FP8.

T tokens, K slots per token, H hidden, I expert width, E experts.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from deepseek_kernels.cpu import fp8_experts
from deepseek_kernels.epilogue import Epilogue, epilogue_text
from deepseek_kernels.fp8 import FP8
from deepseek_kernels.fused_moe import _NAMES, _check, _check_biases, check_are_tensors
from deepseek_kernels.gpu.device_guard import on_device_of
from deepseek_kernels.lora import LoraFactors, check_factors, tensors_of
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
    gate_up_lora: LoraFactors | None = None,
    down_lora: LoraFactors | None = None,
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
        gate_up_lora: Low-rank factors added to `gate_up_proj`; both projections and `gate_up_bias` are then frozen.
            Their products take x and the activation as they are, not in FP8.
        down_lora: Low-rank factors added to `down_proj`.

    Raises:
        ValueError: As `fused_moe`, and where FP8 cannot be had.

    Reference: DeepSeek-AI 2024, arXiv 2412.19437, section 3.3; weight gradients stay in bf16 here.
    """
    named = (hidden_states, gate_up_proj, down_proj, topk_indices, topk_weights)
    check_are_tensors(**dict(zip(_NAMES, named, strict=True)))
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
    if gate_up_lora is not None or down_lora is not None:
        check_factors(*projections, gate_up_bias, gate_up_lora, down_lora)
    if runs_triton(hidden_states):
        fp8_experts_gpu.check_weights(fp8_experts.Weights(gate_up_proj, down_proj, *scales, block))
    x, indices, weights = hidden_states.contiguous(), topk_indices.contiguous(), topk_weights.contiguous()
    bias = None if gate_up_bias is None else gate_up_bias.contiguous()
    factors, scalings = tensors_of(x, gate_up_lora, down_lora)
    floats = (x, gate_up_proj, down_proj, weights, *factors, *(() if bias is None else (bias,)))
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in floats)
    settings = (text, *scales, block, scalings, keep)
    output = _Fp8Experts.apply(x, gate_up_proj, down_proj, indices, weights, bias, *factors, *settings)
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
    """Keeps what `fused_moe` keeps: the input, the pre-activation and integers. Weights are rounded anew each time.

    Under adapters also the factors and r numbers per row and projection.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, gate_up, down, indices, topk_weights, bias, *factors = inputs[:10]
        text, gate_up_scales, down_scales, block, scalings, keep = inputs[10:]
        weights = fp8_experts.Weights(gate_up, down, gate_up_scales, down_scales, block)
        module = _module_for(x)
        with on_device_of(x):
            order = module.route(indices, gate_up.shape[0])
            adapters = module.make_adapters(factors, scalings, None, order, x.dtype)
            output, preactivation = module.forward(
                x, weights, order, topk_weights, text, bias, keep, adapters=adapters
            )
        kept = (x, gate_up, down, topk_weights, gate_up_scales, down_scales, preactivation, *order.tensors())
        rows = (None if one is None else one.low for one in adapters)
        ctx.save_for_backward(*kept, *factors, *rows)
        ctx.text, ctx.block, ctx.scalings = text, block, scalings
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, topk_weights, gate_up_scales, down_scales, preactivation, *rest = ctx.saved_tensors
        order, factors, rows = SlotOrder(*rest[:3]), rest[3:7], rest[7:]
        weights = fp8_experts.Weights(gate_up, down, gate_up_scales, down_scales, ctx.block)
        # Whatever codes say of themselves; and weights under an adapter were checked to be frozen.
        is_frozen = gate_up_scales is not None
        needs = tuple(ctx.needs_input_grad[i] and not (is_frozen and i in (1, 2)) for i in (0, 1, 2, 4, 5))
        needs_factors = ctx.needs_input_grad[6:10]
        module = _module_for(x)
        with on_device_of(x):
            adapters = module.make_adapters(factors, ctx.scalings, rows, order, x.dtype, needs_factors)
            grad_x, grad_gate_up, grad_down, grad_weights, grad_bias = module.backward(
                grad_output.contiguous(),
                x,
                weights,
                order,
                topk_weights,
                preactivation,
                ctx.text,
                needs,
                adapters=adapters,
            )
            found = module.factor_gradients(adapters, factors)
        of_factors = (grad if need else None for grad, need in zip(found, needs_factors, strict=True))
        return grad_x, grad_gate_up, grad_down, None, grad_weights, grad_bias, *of_factors, *(None,) * 6
