"""LoRA inside `fused_moe`: frozen experts, and two low-rank factors of each projection that train.

``W_e + scaling * B_e A_e`` is never formed and no gradient of W is taken: the factors' products run between the
operator's own, and its backward pass gives what flows into A, B, the input and the router weights. Beside what
`fused_moe` keeps, r numbers per row and projection are kept. The factors are read as PEFT stores them for a 3-D
parameter (``peft.tuners.lora.layer.ParamWrapper``): in B the expert runs fastest.

T tokens, K slots per token, S = T*K rows, H hidden, I expert width, E experts, r rank.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepseek_kernels.cpu import decode
from deepseek_kernels.cpu import experts as experts_cpu
from deepseek_kernels.cpu.low_rank import Adapters, LowRank, in_pefts_order, stacked
from deepseek_kernels.four_bit import PackedMatrices
from deepseek_kernels.gpu.device_guard import on_device_of
from deepseek_kernels.slot_order import SlotOrder
from deepseek_kernels.triton_path import adapters_gpu, experts_gpu, runs_triton


@dataclass(frozen=True)
class LoraFactors:
    """What is added to one projection: ``scaling * B_e A_e`` to the matrix of expert e.

    Attributes:
        a: [E * r, N] for N inputs; the r rows of an expert lie together.
        b: [M, r * E] for M outputs; column ``i * E + e`` is column i of expert e.
        scaling: PEFT's ``lora_alpha / r``.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0


def check_factors(
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    gate_up: LoraFactors | None,
    down: LoraFactors | None,
) -> None:
    """Raise a ValueError in one line where factors do not fit the experts.

    Args:
        gate_up_proj: [E, 2I, H].
        down_proj: [E, H, I].
        gate_up_bias: [E, 2I] or None.
        gate_up: Factors of the first, or None.
        down: Factors of the second, or None.
    """
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj), ("gate_up_bias", gate_up_bias)):
        if weight is not None and weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: got requires_grad, expected weights and a bias that are frozen under an adapter"
            )
    for name, weight, factors in (("gate_up_lora", gate_up_proj, gate_up), ("down_lora", down_proj, down)):
        if factors is None:
            continue
        if not isinstance(factors, LoraFactors):
            raise ValueError(f"{name}: got {type(factors).__name__}, expected LoraFactors or None")
        if not math.isfinite(factors.scaling):
            raise ValueError(f"{name}.scaling: got {factors.scaling}, expected a finite number")
        num_experts, height, width = weight.shape
        a, b = factors.a, factors.b
        for letter, factor in (("a", a), ("b", b)):
            if not isinstance(factor, Tensor):
                raise ValueError(f"{name}.{letter}: got {type(factor).__name__}, expected a tensor")
        if a.dim() != 2 or a.shape[1] != width or a.shape[0] == 0 or a.shape[0] % num_experts:
            expected = f"({num_experts} * r, {width}) with r of at least 1"
            raise ValueError(f"{name}.a: got shape {tuple(a.shape)}, expected {expected}")
        if tuple(b.shape) != (height, a.shape[0]):
            raise ValueError(f"{name}.b: got shape {tuple(b.shape)}, expected {(height, a.shape[0])}")
        for letter, factor in (("a", a), ("b", b)):
            if factor.device != weight.device or not factor.is_floating_point():
                got = f"{factor.dtype} on {factor.device}"
                raise ValueError(f"{name}.{letter}: got {got}, expected floats on {weight.device}")


def tensors_of(
    x: Tensor, gate_up: LoraFactors | None, down: LoraFactors | None
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[float, float]]:
    """Return A and B of both projections and their scalings, without elements where there are no factors.

    Args:
        x: Any operand of the call.
        gate_up: Factors of the first projection, or None.
        down: Factors of the second, or None.
    """
    if gate_up is None or down is None:
        nothing = x.new_empty(0, 0)
        none = LoraFactors(nothing, nothing, 0.0)
        gate_up, down = gate_up or none, down or none
    return (gate_up.a, gate_up.b, down.a, down.b), (float(gate_up.scaling), float(down.scaling))


def fused_moe_lora(
    operands: Sequence[Tensor],
    gate_up: LoraFactors | None,
    down: LoraFactors | None,
    activation: str,
    gate_up_bias: Tensor | None = None,
    max_rows: int | None = None,
) -> Tensor:
    """Return what `fused_moe` returns, with the factors' part; `fused_moe` calls it after its checks.

    Args:
        operands: hidden_states, gate_up_proj, down_proj, topk_indices and topk_weights, contiguous; the projections
            may be `PackedMatrices`, with or without factors.
        gate_up: Factors of the first projection.
        down: Factors of the second.
        activation: Text of the epilogue.
        gate_up_bias: [E, 2I].
        max_rows: At most so many slots are used; None for any number.
    """
    x = operands[0]
    factors, scalings = tensors_of(x, gate_up, down)
    inputs: tuple[Any, ...] = (*operands, *factors, *scalings, activation, gate_up_bias, max_rows)
    keep = torch.is_grad_enabled() and any([t.requires_grad for t in (x, operands[4], *factors)])
    is_packed = isinstance(operands[1], PackedMatrices)  # no operator takes those
    if not is_packed and (torch.compiler.is_compiling() or x.is_meta or torch._C._len_torch_dispatch_stack()):
        return _forward_op(*inputs, keep)[0]
    if keep:
        return _Eager.apply(*inputs)
    inputs = (*inputs, False)
    return _forward(*inputs)[0]


def _adapters(
    factors: Sequence[Tensor],
    scalings: Sequence[float],
    rows: Sequence[Tensor],
    expert_start: Tensor,
    dtype: torch.dtype,
) -> Adapters:
    num_experts = expert_start.numel() - 1
    pair: list[LowRank | None] = []
    for i in range(2):
        a, b = factors[2 * i : 2 * i + 2]
        pair.append(
            LowRank(*stacked(a.to(dtype), b.to(dtype), num_experts), scalings[i], rows[i], expert_start)
            if a.numel()
            else None
        )
    return Adapters(*pair)


def _forward(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_indices: Tensor,
    topk_weights: Tensor,
    gate_up_a: Tensor,
    gate_up_b: Tensor,
    down_a: Tensor,
    down_b: Tensor,
    gate_up_scaling: float,
    down_scaling: float,
    activation: str,
    gate_up_bias: Tensor | None,
    max_rows: int | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_slots, num_experts, dtype = topk_indices.numel(), gate_up_proj.shape[0], hidden_states.dtype
    num_rows = num_slots if max_rows is None else max_rows
    inputs = (hidden_states, gate_up_proj.to(dtype), down_proj.to(dtype))
    bias = None if gate_up_bias is None else gate_up_bias.to(dtype)
    rows = [hidden_states.new_empty(num_rows, a.shape[0] // num_experts) for a in (gate_up_a, down_a)]
    factors, scalings = (gate_up_a, gate_up_b, down_a, down_b), (gate_up_scaling, down_scaling)
    if runs_triton(hidden_states):
        with on_device_of(hidden_states):
            pair = adapters_gpu.make_adapters(factors, scalings, rows, num_experts)
            output, kept, metadata = experts_gpu.forward(
                *inputs, topk_indices, topk_weights, activation, keep, bias, pair, max_rows
            )
        return output, kept, *_kept(rows, metadata, keep, topk_indices)
    order = experts_cpu.route(topk_indices, num_experts, max_rows)
    adapters = _adapters(factors, scalings, rows, order.expert_start, dtype)
    if num_slots <= decode.MAX_ROWS:
        row_slot = order.row_slot if keep else None
        output, kept = decode.forward(*inputs, topk_indices, topk_weights, activation, row_slot, bias, adapters)
    else:
        output, kept = experts_cpu.forward(
            *inputs, order, topk_weights, activation, keep, bias, adapters.for_many_rows()
        )
    return output, kept, *_kept(rows, order, keep, topk_indices)


def _kept(
    rows: Sequence[Tensor], order: SlotOrder | None, keep: bool, indices: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the backward pass needs beside the pre-activation: rows of both ranks and the order, or five of nothing."""
    first, second = rows if keep else (one.new_empty(0) for one in rows)
    return first, second, *(order.tensors() if keep and order is not None else SlotOrder.none_like(indices))


_forward_op = torch.library.custom_op("deepseek_kernels::fused_moe_lora", _forward, mutates_args=())


@_forward_op.register_fake
def _(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_indices: Tensor,
    topk_weights: Tensor,
    gate_up_a: Tensor,
    gate_up_b: Tensor,
    down_a: Tensor,
    down_b: Tensor,
    gate_up_scaling: float,
    down_scaling: float,
    activation: str,
    gate_up_bias: Tensor | None,
    max_rows: int | None,
    keep: bool,
) -> tuple[Tensor, ...]:
    num_slots, (num_experts, twice_width, _) = topk_indices.numel(), gate_up_proj.shape
    if not keep:
        nothing = (hidden_states.new_empty(0) for _ in range(2))
        return (
            torch.empty_like(hidden_states),
            hidden_states.new_empty(0, twice_width),
            *nothing,
            *SlotOrder.none_like(topk_indices),
        )
    num_rows = num_slots if max_rows is None else max_rows
    rows = (hidden_states.new_empty(num_rows, a.shape[0] // num_experts) for a in (gate_up_a, down_a))
    order = SlotOrder.empty_like(topk_indices, num_slots, num_experts, max_rows).tensors()
    return torch.empty_like(hidden_states), hidden_states.new_empty(num_rows, twice_width), *rows, *order


@torch.library.custom_op("deepseek_kernels::fused_moe_lora_backward", mutates_args=())
def _backward_op(
    grad_output: Tensor,
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    factors: Sequence[Tensor],
    preactivation: Tensor,
    rows: Sequence[Tensor],
    order: Sequence[Tensor],
    scalings: list[float],
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = hidden_states.dtype
    operands = (grad_output, hidden_states, gate_up_proj.to(dtype), down_proj.to(dtype), SlotOrder(*order))
    wanted = [needs[0], False, False, needs[1], False]
    if runs_triton(hidden_states):
        with on_device_of(hidden_states):
            pair = adapters_gpu.make_adapters(factors, scalings, rows, order[2].numel() - 1, needs[2:])
            grad_x, _, _, grad_weights, _ = experts_gpu.backward(
                *operands, topk_weights, preactivation, activation, wanted, pair
            )
        found = [grad for one in pair for grad in ((None, None) if one is None else (one.grad_a, one.grad_b))]
        return grad_x, grad_weights, *(hidden_states.new_empty(0) if grad is None else grad for grad in found)
    adapters = _adapters(factors, scalings, rows, order[2], dtype).for_many_rows()
    grad_x, _, _, grad_weights, _ = experts_cpu.backward(
        *operands, topk_weights, preactivation, activation, wanted, adapters
    )
    grads: list[Tensor] = []
    for i, adapter in enumerate(adapters):
        (a, b), (needs_a, needs_b) = factors[2 * i : 2 * i + 2], needs[2 * i + 2 : 2 * i + 4]
        nothing = a.new_empty(0)
        grads.append(adapter.grad_a.view(a.shape).to(a.dtype) if adapter is not None and needs_a else nothing)
        grads.append(in_pefts_order(adapter.grad_b, b.dtype) if adapter is not None and needs_b else nothing)
    return grad_x, grad_weights, *grads


@_backward_op.register_fake
def _(
    grad_output: Tensor,
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    factors: Sequence[Tensor],
    preactivation: Tensor,
    rows: Sequence[Tensor],
    order: Sequence[Tensor],
    scalings: list[float],
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    wanted = zip((hidden_states, topk_weights, *factors), needs, strict=True)
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else tensor.new_empty(0)
        for tensor, need in wanted
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_states, gate_up_proj, down_proj, _, topk_weights, *factors = inputs[:9]
    ctx.set_materialize_grads(False)
    if inputs[-1]:
        ctx.packed = [one for one in (gate_up_proj, down_proj) if isinstance(one, PackedMatrices)]
        matrices = () if ctx.packed else (gate_up_proj, down_proj)
        ctx.save_for_backward(hidden_states, topk_weights, *factors, *output[1:], *matrices)
        ctx.scalings, ctx.activation = list(inputs[9:11]), inputs[11]


def _backward(
    ctx: Any, grad_output: Tensor | None, *_: Any, run: Callable[..., Sequence[Tensor]] = _backward_op
) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 15
    hidden_states, topk_weights, *rest = ctx.saved_tensors
    matrices = ctx.packed or rest[10:]
    needs = [ctx.needs_input_grad[i] for i in (0, 4, 5, 6, 7, 8)]
    grads = run(
        grad_output.contiguous(),
        hidden_states,
        *matrices,
        topk_weights,
        list(rest[:4]),
        rest[4],
        list(rest[5:7]),
        list(rest[7:10]),
        ctx.scalings,
        ctx.activation,
        needs,
    )
    x, weights, *factors = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return x, None, None, None, weights, *factors, None, None, None, None, None, None


class _Eager(torch.autograd.Function):
    """The same two calls and the same tensors kept, without the operators around them."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        inputs = (*inputs, True)  # keep
        outputs = _forward(*inputs)
        _setup_context(ctx, inputs, outputs)
        return outputs[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad_output, run=_backward_op._init_fn)[:14]


torch.library.register_autograd("deepseek_kernels::fused_moe_lora", _backward, setup_context=_setup_context)
