"""The router after its logits: scores, bias, groups, top-k, normalization and the number of experts, in one kernel.

`fused_router` computes what DeepSeek-V3's router does and what ``modeling_deepseek.routing`` adds to it (softmax
scores, a varying number of experts per token). As torch operators that is some twenty launches on [T, E] tensors a few
kilobytes wide; here it is one launch forward and one backward.

A token's unused slots get the index E, which `fused_moe` skips. Ties go to the lower expert, where
torch.topk promises nothing. On a CPU the plain reference runs: there are no launches to save.

T tokens, K slots per token, E experts.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.gpu.device_guard import on_device_of
from deepseek_kernels.gpu.triton_numerics import IS_INTERPRETED, LAUNCH, accumulator

SCORINGS = ("sigmoid", "softmax")
_EPSILON = 1e-20


def fused_router(
    router_logits: Tensor,
    *,
    top_k: int,
    bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    scoring: str = "sigmoid",
    normalize: bool = True,
    scale: float = 1.0,
    min_k: int | None = None,
    unused_share: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return chosen experts and their weights, differentiable in the logits.

    ``s = sigmoid(logits)`` or ``softmax(logits)``; the K best of ``s + bias`` within the best groups, a group's worth
    being its two best; then slot k, best first, is used while the share of slots k, k+1, ... exceeds `unused_share`;
    weights are the used s, normalized to sum 1 if asked, times `scale`.

    Args:
        router_logits: [T, E] float32 (float64 for checks), contiguous.
        top_k: K, from 1 to 64 and at most E.
        bias: [E], added for the choice only; None for none.
        num_groups: Groups of consecutive experts; divides E.
        topk_groups: How many groups are open to a token.
        scoring: ``sigmoid`` or ``softmax``.
        normalize: Whether the used weights sum to `scale`.
        scale: Factor on the weights.
        min_k: At least this many slots are used; None for all of them.
        unused_share: 1 - p as a tensor of one element on the device of the logits, so that a controller can steer it
            without a synchronization; needed with `min_k`.

    Returns:
        ``topk_indices`` [T, K] int64, E at unused slots, and ``topk_weights`` [T, K], 0 there.

    Raises:
        ValueError: A setting is out of range, or a tensor's shape or device does not fit.

    Reference:
        DeepSeek-AI 2024, arXiv 2412.19437, section 2.1.2; Huang et al. 2024, arXiv 2403.07652 (varying K).
    """
    if not isinstance(router_logits, Tensor):
        raise ValueError(f"router_logits: got {type(router_logits).__name__}, expected a tensor")
    _check(router_logits, top_k, num_groups, topk_groups, scoring, min_k, unused_share)
    num_experts = router_logits.shape[1]
    _check_tensor("bias", bias, num_experts, router_logits)
    _check_tensor("unused_share", unused_share, 1, router_logits)
    bias = router_logits.new_zeros(num_experts) if bias is None else bias.to(router_logits.dtype).contiguous()
    share = router_logits.new_zeros(1) if unused_share is None else unused_share.reshape(1).to(router_logits.dtype)
    minimum = top_k if min_k is None else min_k
    settings = (top_k, minimum, num_groups, topk_groups, scoring, normalize, scale)
    if router_logits.is_cuda or IS_INTERPRETED:
        return _router_op(router_logits.contiguous(), bias, share, *settings)
    return fused_router_reference(router_logits, bias, share, *settings)


def fused_router_reference(
    router_logits: Tensor,
    bias: Tensor,
    unused_share: Tensor,
    top_k: int,
    min_k: int,
    num_groups: int,
    topk_groups: int,
    scoring: str,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the same by torch operators.

    Args:
        router_logits: [T, E].
        bias: [E].
        unused_share: [1].
        top_k: K.
        min_k: At least this many used slots.
        num_groups: Groups of experts.
        topk_groups: Open groups.
        scoring: ``sigmoid`` or ``softmax``.
        normalize: Whether weights are normalized.
        scale: Factor on the weights.
    """
    num_tokens, num_experts = router_logits.shape
    scores = router_logits.sigmoid() if scoring == "sigmoid" else router_logits.softmax(-1)
    choice = scores.detach() + bias
    if num_groups > 1:
        groups = choice.view(num_tokens, num_groups, num_experts // num_groups)
        worth = groups.topk(min(2, groups.shape[-1]), dim=-1)[0].sum(-1)
        is_open = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, worth.topk(topk_groups, dim=-1)[1], True)
        choice = groups.masked_fill(~is_open.unsqueeze(-1), float("-inf")).flatten(1)
    indices = choice.topk(top_k, dim=-1)[1]
    weights = scores.gather(1, indices)
    shares = weights.detach() / weights.detach().sum(-1, keepdim=True)
    left = shares.flip(-1).cumsum(-1).flip(-1)
    is_used = (left > unused_share) | (torch.arange(top_k, device=left.device) < min_k)
    weights = weights * is_used
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + _EPSILON)
    return indices.masked_fill(~is_used, num_experts), weights * scale


def _check_tensor(name: str, tensor: Tensor | None, size: int, logits: Tensor) -> None:
    """A kernel reads past the end of a shorter one, and across devices not at all."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor) or tensor.numel() != size or tensor.dim() > 1:
        got = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name}: got {got}, expected a tensor of shape [{size}]")
    if tensor.device != logits.device:
        raise ValueError(f"{name}: got device {tensor.device}, expected that of router_logits, {logits.device}")


def _check(
    logits: Tensor,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    scoring: str,
    min_k: int | None,
    unused_share: Tensor | None,
) -> None:
    if logits.dim() != 2 or logits.dtype not in (torch.float32, torch.float64) or logits.shape[1] == 0:
        raise ValueError(
            f"router_logits: got {logits.dtype} {tuple(logits.shape)}, expected [T, E] float32 or float64"
        )
    num_experts = logits.shape[1]
    for name, got, low, high in (
        ("top_k", top_k, 1, min(64, num_experts)),
        ("num_groups", num_groups, 1, num_experts),
        ("topk_groups", topk_groups, 1, num_groups),
        ("min_k", top_k if min_k is None else min_k, 1, top_k),
    ):
        if not low <= got <= high:
            raise ValueError(f"{name}: got {got}, expected {low} to {high}")
    if num_experts % num_groups or top_k > topk_groups * (num_experts // num_groups):
        raise ValueError(
            f"num_groups: got {num_groups} of which {topk_groups} are open, expected a divisor of {num_experts} that "
            f"leaves at least {top_k} experts"
        )
    if scoring not in SCORINGS:
        raise ValueError(f"scoring: got {scoring!r}, expected one of {', '.join(SCORINGS)}")
    if (min_k is None) != (unused_share is None):
        raise ValueError("unused_share: expected together with min_k, or neither")


@torch.library.custom_op("deepseek_kernels::router", mutates_args=())
def _router_op(
    logits: Tensor,
    bias: Tensor,
    unused_share: Tensor,
    top_k: int,
    min_k: int,
    num_groups: int,
    topk_groups: int,
    scoring: str,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = logits.shape
    indices = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = logits.new_empty(num_tokens, top_k)
    if num_tokens:
        with on_device_of(logits):
            router_kernel[(num_tokens,)](
                logits,
                bias,
                unused_share,
                indices,
                weights,
                num_experts,
                scale,
                **_constants(num_experts, top_k, scoring, normalize, logits.dtype),
                MIN_K=min_k,
                TOPK_GROUPS=topk_groups,
                NUM_GROUPS=num_groups,
                GROUPS=triton.next_power_of_2(num_groups),
                PER_GROUP=triton.next_power_of_2(num_experts // num_groups),
                **LAUNCH,
            )
    return indices, weights


@_router_op.register_fake
def _(
    logits: Tensor,
    bias: Tensor,
    unused_share: Tensor,
    top_k: int,
    min_k: int,
    num_groups: int,
    topk_groups: int,
    scoring: str,
    normalize: bool,
    scale: float,
) -> Any:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape)


@torch.library.custom_op("deepseek_kernels::router_backward", mutates_args=())
def _router_backward_op(
    grad_weights: Tensor, logits: Tensor, indices: Tensor, scoring: str, normalize: bool, scale: float
) -> Tensor:
    (num_tokens, num_experts), top_k = logits.shape, indices.shape[1]
    grad_logits = torch.empty_like(logits)
    if num_tokens:
        with on_device_of(logits):
            router_backward_kernel[(num_tokens,)](
                grad_weights,
                logits,
                indices,
                grad_logits,
                num_experts,
                scale,
                **_constants(num_experts, top_k, scoring, normalize, logits.dtype),
                EXPERTS=triton.next_power_of_2(num_experts),
                **LAUNCH,
            )
    return grad_logits


@_router_backward_op.register_fake
def _(grad_weights: Tensor, logits: Tensor, indices: Tensor, scoring: str, normalize: bool, scale: float) -> Any:
    return torch.empty_like(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], output[0])
    ctx.settings = inputs[7:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, _: Tensor | None, grad_weights: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_weights is None:
        return (None,) * 10
    grad_logits = _router_backward_op(grad_weights.contiguous(), *ctx.saved_tensors, *ctx.settings)
    return grad_logits, *(None,) * 9


torch.library.register_autograd("deepseek_kernels::router", _backward, setup_context=_setup_context)


def _constants(num_experts: int, top_k: int, scoring: str, normalize: bool, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "TOP_K": top_k,
        "SLOTS": triton.next_power_of_2(top_k),
        "IS_SIGMOID": scoring == "sigmoid",
        "NORMALIZE": normalize,
        "ACC": accumulator(dtype),
    }


def example_constants(num_experts: int) -> dict[str, Any]:
    """The forward kernel's compile-time arguments for DeepSeek-V3's settings, for compile-only checks."""
    groups = {"MIN_K": 8, "TOPK_GROUPS": 4, "NUM_GROUPS": 8, "GROUPS": 8, "PER_GROUP": num_experts // 8}
    return {**_constants(num_experts, 12, "sigmoid", True, torch.float32), **groups}


def example_backward_constants(num_experts: int) -> dict[str, Any]:
    """The backward kernel's compile-time arguments, for compile-only checks."""
    experts = triton.next_power_of_2(num_experts)
    return {**_constants(num_experts, 12, "sigmoid", True, torch.float32), "EXPERTS": experts}


@triton.jit
def router_kernel(
    logits_ptr,
    bias_ptr,
    share_ptr,
    indices_ptr,
    weights_ptr,
    num_experts,
    scale,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    MIN_K: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
):
    """One token; its experts as a [group, expert in group] tile."""
    token = tl.program_id(0).to(tl.int64)
    size = num_experts // NUM_GROUPS
    groups, members = tl.arange(0, GROUPS), tl.arange(0, PER_GROUP)
    experts = groups[:, None] * size + members[None, :]
    is_expert = (groups < NUM_GROUPS)[:, None] & (members < size)[None, :]
    lowest = float("-inf")
    logits = tl.load(logits_ptr + token * num_experts + experts, mask=is_expert, other=lowest).to(ACC)
    if IS_SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        scores = tl.exp(logits - tl.max(tl.max(logits, 1), 0))
        scores = scores / tl.sum(tl.sum(scores, 1), 0)
    choice = tl.where(is_expert, scores + tl.load(bias_ptr + experts, mask=is_expert, other=0.0).to(ACC), lowest)

    if NUM_GROUPS > 1:
        best = tl.max(choice, 1)
        # The second best is the best of what remains without the first place the best stands at.
        place = tl.min(tl.where(choice == best[:, None], members[None, :], PER_GROUP), 1)
        second = tl.max(tl.where(members[None, :] == place[:, None], lowest, choice), 1)
        worth = tl.where(groups < NUM_GROUPS, best + tl.where(second == lowest, 0.0, second), lowest)
        is_open = groups < 0
        for _ in range(TOPK_GROUPS):
            top = tl.min(tl.where(worth == tl.max(worth, 0), groups, GROUPS), 0)
            is_open = is_open | (groups == top)
            worth = tl.where(groups == top, lowest, worth)
        choice = tl.where(is_open[:, None], choice, lowest)

    slots = tl.arange(0, SLOTS)
    chosen = tl.zeros((SLOTS,), dtype=tl.int32)
    kept = tl.zeros((SLOTS,), dtype=ACC)
    for k in range(TOP_K):
        highest = tl.max(tl.max(choice, 1), 0)
        expert = tl.min(tl.min(tl.where(choice == highest, experts, num_experts - 1), 1), 0)
        is_it = experts == expert
        chosen = tl.where(slots == k, expert, chosen)
        kept = tl.where(slots == k, tl.sum(tl.sum(tl.where(is_it & is_expert, scores, 0.0), 1), 0), kept)
        choice = tl.where(is_it, lowest, choice)

    left = tl.cumsum(kept / tl.sum(kept, 0), 0, reverse=True)
    is_used = ((left > tl.load(share_ptr).to(ACC)) | (slots < MIN_K)) & (slots < TOP_K)
    kept = tl.where(is_used, kept, 0.0)
    if NORMALIZE:
        kept = kept / (tl.sum(kept, 0) + 1e-20)
    places = token * TOP_K + slots
    tl.store(indices_ptr + places, tl.where(is_used, chosen, num_experts).to(tl.int64), mask=slots < TOP_K)
    tl.store(weights_ptr + places, kept * scale, mask=slots < TOP_K)


@triton.jit
def router_backward_kernel(
    grad_weights_ptr,
    logits_ptr,
    indices_ptr,
    grad_logits_ptr,
    num_experts,
    scale,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """One token: the gradient at its used slots, spread over all its logits."""
    token = tl.program_id(0).to(tl.int64)
    slots, experts = tl.arange(0, SLOTS), tl.arange(0, EXPERTS)
    is_expert = experts < num_experts
    chosen = tl.load(indices_ptr + token * TOP_K + slots, mask=slots < TOP_K, other=num_experts).to(tl.int32)
    is_used = chosen < num_experts
    grad = tl.load(grad_weights_ptr + token * TOP_K + slots, mask=is_used, other=0.0).to(ACC) * scale
    row = logits_ptr + token * num_experts
    logits = tl.load(row + experts, mask=is_expert, other=float("-inf")).to(ACC)
    at_chosen = tl.load(row + chosen, mask=is_used, other=float("-inf")).to(ACC)
    spread = tl.zeros((EXPERTS,), dtype=ACC)
    if IS_SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-at_chosen))
        if NORMALIZE:
            total = tl.sum(scores, 0) + 1e-20
            grad = grad / total - tl.sum(grad * scores, 0) / (total * total)
        grad = grad * scores * (1.0 - scores)
    else:
        highest = tl.max(logits, 0)
        exponentials = tl.exp(at_chosen - highest)
        everything = tl.exp(logits - highest)
        scores = exponentials / tl.sum(exponentials if NORMALIZE else everything, 0)
        mean = tl.sum(grad * scores, 0)
        if NORMALIZE:
            grad = scores * (grad - mean)
        else:
            grad = scores * grad
            spread = -mean * everything / tl.sum(everything, 0)
    is_it = (chosen[:, None] == experts[None, :]) & is_used[:, None]
    spread += tl.sum(tl.where(is_it, grad[:, None], 0.0), 0)
    tl.store(grad_logits_ptr + token * num_experts + experts, spread, mask=is_expert)
