"""The fused MoE layer: `fused_moe` and its plain reference.

``modeling_deepseek.fused_experts`` registers it with transformers as the experts implementation ``fused_moe``.
Forward and backward are one custom operator each, so ``torch.compile(fullgraph=True)`` sees two opaque
calls; without a compiler the functions behind them are called directly. What is kept between them is exactly the
input, the pre-activation of each row, and integers: 2H + 4KI bytes per token in bf16, where transformers' grouped_mm
keeps K(4H + 8I).

T tokens, K slots per token, S = T*K rows, H hidden, I expert width, E experts.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from deepseek_kernels.cpu import decode
from deepseek_kernels.cpu import experts as fused_moe_cpu
from deepseek_kernels.epilogue import Epilogue, epilogue_text
from deepseek_kernels.gpu.device_guard import on_device_of
from deepseek_kernels.lora import LoraFactors, check_factors, fused_moe_lora
from deepseek_kernels.routed_bias import routed_bias
from deepseek_kernels.slot_order import SlotOrder
from deepseek_kernels.triton_path import experts_gpu as fused_moe_gpu
from deepseek_kernels.triton_path import runs_triton

MAX_SLOTS = 64
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_NAMES = ("hidden_states", "gate_up_proj", "down_proj", "topk_indices", "topk_weights")
_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fused_moe(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_indices: Tensor,
    topk_weights: Tensor,
    *,
    activation: str | Epilogue = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_up_lora: LoraFactors | None = None,
    down_lora: LoraFactors | None = None,
    max_rows: int | None = None,
) -> Tensor:
    """Return the weighted sum of each token's routed experts, differentiable in all float arguments.

    ``out[t] = sum_k w[t, k] * down[e] @ (act(gate[e] @ x[t]) * (up[e] @ x[t]))`` with ``e = topk_indices[t, k]``.

    Args:
        hidden_states: [T, H]; float32, bfloat16 or float16 (float64 for checks).
        gate_up_proj: [E, 2I, H], gate rows before up rows; contiguous, dtype of `hidden_states`.
        down_proj: [E, H, I]; contiguous, dtype of `hidden_states`.
        topk_indices: [T, K] int32 or int64, K at most 64. An index at or above E is an unused slot. A negative one is
            an error on a CPU; on a GPU, where looking would stall the stream, it counts as unused.
        topk_weights: [T, K], any float dtype.
        activation: ``silu``, ``gelu`` or ``gelu_pytorch_tanh`` (transformers' names); an `Epilogue` for clamps, a
            factor in the sigmoid, a shift of up and interleaved weights.
        gate_up_bias: [E, 2I] in the order of the rows of `gate_up_proj`; dtype of `gate_up_proj`.
        down_bias: [E, H]; dtype of `down_proj`.
        gate_up_lora: Low-rank factors added to `gate_up_proj`; both projections and `gate_up_bias` are then frozen.
        down_lora: Low-rank factors added to `down_proj`.
        max_rows: At most so many slots are used, so the buffers have so many rows: for a device that has few of the
            experts. More are an error on a CPU; on a GPU, where counting would stall the stream, the tokens that
            found no row come out NaN.

    Returns:
        [T, H] in the dtype of `hidden_states` (under autocast: in autocast's dtype).

    Raises:
        ValueError: Shapes, dtypes, devices or layout do not fit together, or an argument is not a tensor.

    Example:
        >>> import torch
        >>> x, w1, w2 = torch.ones(2, 4), torch.ones(3, 6, 4), torch.ones(3, 4, 3)
        >>> ids, weights = torch.tensor([[0, 2], [1, 3]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]])
        >>> fused_moe(x, w1, w2, ids, weights).shape
        torch.Size([2, 4])
    """
    named = (hidden_states, gate_up_proj, down_proj, topk_indices, topk_weights)
    check_are_tensors(**dict(zip(_NAMES, named, strict=True)))
    device_type = hidden_states.device.type
    # The meta device, on which shapes are worked out, knows no autocast and raises when asked.
    is_autocast = not hidden_states.is_meta and torch.is_autocast_enabled(device_type)
    if is_autocast:
        hidden_states = hidden_states.to(torch.get_autocast_dtype(device_type))
    activation = epilogue_text(activation)
    # Under autocast the operator casts the weights: a copy made here would be kept until the backward pass.
    _check(hidden_states, gate_up_proj, down_proj, topk_indices, topk_weights, casts_weights=is_autocast)
    _check_biases(gate_up_proj, down_proj, gate_up_bias, down_bias)
    floats = (hidden_states, gate_up_proj, down_proj, topk_weights, *(() if gate_up_bias is None else (gate_up_bias,)))
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in floats)
    indices, weights = topk_indices.contiguous(), topk_weights.contiguous()
    max_rows = _checked_max_rows(max_rows, indices)
    operands = (hidden_states.contiguous(), gate_up_proj, down_proj, indices, weights, activation, keep, gate_up_bias)
    operands = (*operands, max_rows)
    if gate_up_lora is None and down_lora is None:
        output = _experts(operands, floats)
    else:
        check_factors(gate_up_proj, down_proj, gate_up_bias, gate_up_lora, down_lora)
        output = fused_moe_lora(operands[:5], gate_up_lora, down_lora, activation, gate_up_bias, max_rows)
    if down_bias is None:
        return output
    return output + routed_bias(down_bias.to(output.dtype), indices, weights)


def _experts(operands: tuple[Any, ...], floats: tuple[Tensor, ...]) -> Tensor:
    """The experts by the shortest way: the functions themselves, or the operators around them."""
    # The operators' dispatch takes the host 0.1 ms, and 1 ms with gradients: more than a small step takes a GPU. They
    # are there for compilers and for whoever watches operators.
    if torch.compiler.is_compiling() or operands[0].is_meta or any(type(t) not in _PLAIN_TYPES for t in floats):
        return _forward_op(*operands)[0]
    if not operands[6]:
        return _forward(*operands)[0]
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return _forward_op(*operands)[0]
    return _Eager.apply(*operands)


def fused_moe_reference(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_indices: Tensor,
    topk_weights: Tensor,
    *,
    activation: str | Epilogue = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Return what `fused_moe` returns, by a loop over slots that nobody can misread; slow, differentiable.

    Args:
        hidden_states: [T, H].
        gate_up_proj: [E, 2I, H].
        down_proj: [E, H, I].
        topk_indices: [T, K].
        topk_weights: [T, K].
        activation: As in `fused_moe`.
        gate_up_bias: [E, 2I].
        down_bias: [E, H].
    """
    epilogue = Epilogue.read(epilogue_text(activation))
    num_experts = gate_up_proj.shape[0]
    rows = []
    for token in range(hidden_states.shape[0]):
        row = hidden_states[token] * 0
        for slot in range(topk_indices.shape[1]):
            expert = int(topk_indices[token, slot])
            if expert >= num_experts:
                continue
            h = gate_up_proj[expert] @ hidden_states[token]
            h = h if gate_up_bias is None else h + gate_up_bias[expert]
            y = down_proj[expert] @ epilogue.apply(h.unsqueeze(0)).squeeze(0)
            y = y if down_bias is None else y + down_bias[expert]
            row = row + topk_weights[token, slot].to(y.dtype) * y
        rows.append(row)
    return torch.stack(rows) if rows else hidden_states * 1


def check_are_tensors(**operands: object) -> None:
    """Raise a ValueError that names the first operand that is not a tensor.

    Args:
        **operands: By the names of the arguments.
    """
    for name, operand in operands.items():
        if not isinstance(operand, Tensor):
            raise ValueError(f"{name}: got {type(operand).__name__}, expected a tensor")


def _check(
    x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, casts_weights: bool = False
) -> None:
    """Raise a ValueError that names argument, got and wanted, for the first thing that does not fit."""

    def wrong(name: str, got: object, wanted: str) -> NoReturn:
        raise ValueError(f"{name}: got {got}, expected {wanted}")

    for name, tensor, dims in zip(_NAMES, (x, gate_up, down, indices, weights), (2, 3, 3, 2, 2), strict=True):
        if tensor.dim() != dims:
            wrong(name, f"{tensor.dim()} dimensions", f"{dims}")
        if tensor.device != x.device:
            wrong(name, f"device {tensor.device}", f"that of hidden_states, {x.device}")
    if x.dtype not in _FLOAT_DTYPES:
        wrong("hidden_states", f"dtype {x.dtype}", "float32, bfloat16, float16 or float64")
    hidden, num_experts, width = x.shape[1], gate_up.shape[0], down.shape[2]
    if num_experts == 0 or hidden == 0 or width == 0:
        wrong("gate_up_proj", f"shape {tuple(gate_up.shape)}", "at least one expert, hidden and width of at least 1")
    for name, tensor, shape in (
        ("gate_up_proj", gate_up, (num_experts, 2 * width, hidden)),
        ("down_proj", down, (num_experts, hidden, width)),
        ("topk_weights", weights, tuple(indices.shape)),
    ):
        if tuple(tensor.shape) != shape:
            wrong(name, f"shape {tuple(tensor.shape)}", f"{shape}")
    for name, tensor in (("gate_up_proj", gate_up), ("down_proj", down)):
        if tensor.dtype != x.dtype and not (casts_weights and tensor.dtype in _FLOAT_DTYPES):
            wrong(name, f"dtype {tensor.dtype}", f"that of hidden_states, {x.dtype}")
        if not tensor.is_contiguous():
            wrong(name, f"strides {tensor.stride()}", "a contiguous tensor")
    if indices.dtype not in (torch.int32, torch.int64):
        wrong("topk_indices", f"dtype {indices.dtype}", "int32 or int64")
    if not weights.is_floating_point():
        wrong("topk_weights", f"dtype {weights.dtype}", "a float dtype")
    if indices.shape[0] != x.shape[0] or not 1 <= indices.shape[1] <= MAX_SLOTS:
        wrong("topk_indices", f"shape {tuple(indices.shape)}", f"({x.shape[0]}, K) with K from 1 to {MAX_SLOTS}")


def _check_biases(gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None) -> None:
    """Raise a ValueError for a bias that does not fit its weights."""
    for name, bias, weights in (("gate_up_bias", gate_up_bias, gate_up), ("down_bias", down_bias, down)):
        if bias is None:
            continue
        if not isinstance(bias, Tensor):
            raise ValueError(f"{name}: got {type(bias).__name__}, expected a tensor")
        for what, got, fits in (
            ("shape", tuple(bias.shape), tuple(weights.shape[:2])),
            ("dtype", bias.dtype, weights.dtype),
            ("device", bias.device, weights.device),
        ):
            if got != fits:
                raise ValueError(f"{name}: got {what} {got}, expected {fits}")


def _checked_max_rows(max_rows: int | None, indices: Tensor) -> int | None:
    """`max_rows` where it bounds anything, else None; a ValueError for one that cannot be."""
    if max_rows is None:
        return None
    if max_rows < 0:
        raise ValueError(f"max_rows: got {max_rows}, expected 0 or more")
    return max_rows if max_rows < indices.numel() else None


def _forward(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_indices: Tensor,
    topk_weights: Tensor,
    activation: str,
    keep: bool,
    gate_up_bias: Tensor | None = None,
    max_rows: int | None = None,
) -> tuple[Tensor, Tensor, SlotOrder | None]:
    """Return the output and, for the backward pass, the pre-activation and the order of its rows."""
    num_rows, num_experts, dtype = topk_indices.numel(), gate_up_proj.shape[0], hidden_states.dtype
    inputs = (hidden_states, gate_up_proj.to(dtype), down_proj.to(dtype))
    bias = None if gate_up_bias is None else gate_up_bias.to(dtype).contiguous()
    if runs_triton(hidden_states):
        with on_device_of(hidden_states):
            slots = (topk_indices, topk_weights)
            return fused_moe_gpu.forward(*inputs, *slots, activation, keep, bias, max_rows=max_rows)
    order = None
    if keep or max_rows is not None or num_rows > decode.MAX_ROWS:
        order = fused_moe_cpu.route(topk_indices, num_experts, max_rows)
    if num_rows <= decode.MAX_ROWS:
        row_slot = order.row_slot if keep else None
        return *decode.forward(*inputs, topk_indices, topk_weights, activation, row_slot, bias), order
    return *fused_moe_cpu.forward(*inputs, order, topk_weights, activation, keep, bias), order


@torch.library.custom_op("deepseek_kernels::fused_moe", mutates_args=())
def _forward_op(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_indices: Tensor,
    topk_weights: Tensor,
    activation: str,
    keep: bool,
    gate_up_bias: Tensor | None,
    max_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    operands = (hidden_states, gate_up_proj, down_proj, topk_indices, topk_weights)
    output, preactivation, order = _forward(*operands, activation, keep, gate_up_bias, max_rows)
    return output, preactivation, *(order.tensors() if keep else SlotOrder.none_like(topk_indices))


@_forward_op.register_fake
def _(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_indices: Tensor,
    topk_weights: Tensor,
    activation: str,
    keep: bool,
    gate_up_bias: Tensor | None = None,
    max_rows: int | None = None,
) -> tuple[Tensor, ...]:
    num_slots, (num_experts, twice_width, _) = topk_indices.numel(), gate_up_proj.shape
    order = SlotOrder.empty_like(topk_indices, num_slots, num_experts, max_rows).tensors()
    preactivation = hidden_states.new_empty(order[0].numel() if keep else 0, twice_width)
    return torch.empty_like(hidden_states), preactivation, *(order if keep else SlotOrder.none_like(topk_indices))


@torch.library.custom_op("deepseek_kernels::fused_moe_backward", mutates_args=())
def _backward_op(
    grad_output: Tensor,
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    expert_start: Tensor,
    topk_weights: Tensor,
    preactivation: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    module, dtype = fused_moe_gpu if runs_triton(hidden_states) else fused_moe_cpu, hidden_states.dtype
    with on_device_of(hidden_states):
        grad_x, grad_gate_up, grad_down, grad_weights, grad_bias = module.backward(
            grad_output,
            hidden_states,
            gate_up_proj.to(dtype),
            down_proj.to(dtype),
            SlotOrder(row_slot, slot_row, expert_start),
            topk_weights,
            preactivation,
            activation,
            needs,
        )
        grad_gate_up, grad_bias = grad_gate_up.to(gate_up_proj.dtype), grad_bias.to(gate_up_proj.dtype)
        return grad_x, grad_gate_up, grad_down.to(down_proj.dtype), grad_weights, grad_bias


@_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    expert_start: Tensor,
    weights: Tensor,
    preactivation: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    shapes = (x.shape, gate_up.shape, down.shape, weights.shape, gate_up.shape[:2])
    wanted = zip((x, gate_up, down, weights, gate_up), shapes, needs, strict=True)
    return tuple(tensor.new_empty(shape if need else (0,)) for tensor, shape, need in wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_states, gate_up_proj, down_proj, _, topk_weights, activation, keep, *_ = inputs
    _, preactivation, *order = output
    ctx.set_materialize_grads(False)
    if keep:
        ctx.save_for_backward(hidden_states, gate_up_proj, down_proj, *order, topk_weights, preactivation)
        ctx.activation = activation


def _backward(
    ctx: Any, grad_output: Tensor | None, *_: Any, run: Callable[..., Sequence[Tensor]] = _backward_op
) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 9
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4, 7)]
    grads = run(grad_output.contiguous(), *ctx.saved_tensors, ctx.activation, needs)
    x, gate_up, down, weights, bias = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return x, gate_up, down, None, weights, None, None, bias, None


class _Eager(torch.autograd.Function):
    """The same two calls and the same tensors kept, without the operators around them."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output, preactivation, order = _forward(*inputs)
        _setup_context(ctx, inputs, (output, preactivation, *order.tensors()))
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad_output, run=_backward_op._init_fn)


torch.library.register_autograd("deepseek_kernels::fused_moe", _backward, setup_context=_setup_context)
