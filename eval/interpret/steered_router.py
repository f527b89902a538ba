"""A router kept from one expert, or held to a choice, while the model runs; of any family.

Routers choose by `topk` (or `argmax`) of scores over their experts. While a router runs, that call sees -inf for a
masked expert, so that the router chooses among the rest and weighs them as it does; or it returns the experts that
were held, with the values that stand there now, so that weights stay live. What cannot be steered so is refused.

Axes: T tokens, E experts, K slots per token.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from deepseek_eval.interpret.routed_tokens import choice_of
from modeling_deepseek.families import MoeLayer

_CHOOSE = ("topk", "argmax")


class _Masked(TorchFunctionMode):
    """`topk` and `argmax` over E experts, flat or in groups, see -inf in one column."""

    def __init__(self, num_experts: int, expert: int) -> None:
        super().__init__()
        self.num_experts, self.expert = num_experts, expert

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _CHOOSE and args and isinstance(args[0], torch.Tensor):
            scores = args[0]
            is_grouped = scores.ndim == 3 and scores.shape[1] * scores.shape[2] == self.num_experts
            if is_grouped or (scores.ndim > 1 and scores.shape[-1] == self.num_experts):
                flat = scores.flatten(1) if is_grouped else scores
                where = torch.tensor([self.expert], device=scores.device)
                args = (flat.index_fill(-1, where, float("-inf")).view_as(scores), *args[1:])
        return func(*args, **(kwargs or {}))


class _Held(TorchFunctionMode):
    """`topk` over E experts returns the held ones; groups of experts are opened as these need."""

    def __init__(self, num_experts: int, experts: torch.Tensor) -> None:
        super().__init__()
        self.num_experts, self.experts = num_experts, experts

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "topk" or args[0].ndim < 2:
            return func(*args, **kwargs)
        scores, width = args[0].flatten(0, -2), args[0].shape[-1]
        experts = self.experts.repeat(max(1, len(scores) // len(self.experts)), 1).clamp(max=self.num_experts - 1)
        if len(scores) != len(experts):  # within groups of experts
            return func(*args, **kwargs)
        number = kwargs.get("k", args[1] if len(args) > 1 else 0)
        if width == self.num_experts and number == experts.shape[1]:
            shape = (*args[0].shape[:-1], number)
            return torch.return_types.topk((scores.gather(1, experts).view(shape), experts.view(shape)))
        if self.num_experts % width == 0:
            groups = experts // (self.num_experts // width)
            is_needed = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, groups, True)
            args = (args[0].masked_fill(is_needed.view_as(args[0]), float("inf")), *args[1:])
        return func(*args, **kwargs)


@contextmanager
def masked_expert(layer: MoeLayer, expert: int) -> Iterator[None]:
    """Run with one routed expert taken out of the router's choice.

    Args:
        layer: From `find_layers`.
        expert: Its number.

    Raises:
        ValueError: There is no such expert, or the router cannot do without it.
    """
    check_expert(layer, expert)
    forward, router = layer.router.forward, type(layer.router).__name__

    def steered(*args: Any, **kwargs: Any) -> Any:
        with _Masked(_width(layer), expert):
            output = forward(*args, **kwargs)
        choice = choice_of(layer, output)
        if bool(choice.tokens_per_expert(None, choice.num_experts)[expert] > 0):
            raise ValueError(f"expert: got {expert} of {router}, expected one that it can do without")
        return output

    with _replaced_forward(layer.router, steered):
        yield


@contextmanager
def held_choices(layers: list[MoeLayer], experts: list[torch.Tensor], is_used: list[torch.Tensor]) -> Iterator[None]:
    """Run with every router held to given experts; weights stay live.

    Args:
        layers: From `find_layers`.
        experts: By layer `[T, K]` int64. A pass over a multiple of T tokens repeats them.
        is_used: By layer `[T, K]` bool; of our routers with a dynamic number of experts, which slots stay in use.
    """
    if not layers:
        yield
        return
    layer, table, forward = layers[0], experts[0], layers[0].router.forward
    share = getattr(layer.router, "share", None)

    def steered(*args: Any, **kwargs: Any) -> Any:
        with _Held(_width(layer), table):
            return forward(*args, **kwargs)

    def keep_number(shares: torch.Tensor) -> torch.Tensor:
        return is_used[0].repeat(len(shares) // len(is_used[0]), 1)

    with ExitStack() as stack:
        stack.enter_context(_replaced_forward(layer.router, steered))
        if share is not None:
            stack.enter_context(_replaced_forward(share, keep_number))
        stack.enter_context(held_choices(layers[1:], experts[1:], is_used[1:]))
        yield


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _width(layer: MoeLayer) -> int:
    assert layer.num_experts is not None
    return layer.num_experts


def check_expert(layer: MoeLayer, expert: int) -> None:
    """Refuse the number of an expert that a layer does not have.

    Args:
        layer: The layer.
        expert: The number.

    Raises:
        ValueError: There is no such expert.
    """
    if layer.num_experts is None:
        raise ValueError(
            f"model: got {type(layer.router).__name__}, expected a router that says how many experts it has"
        )
    if not 0 <= expert < layer.num_experts:
        raise ValueError(f"expert: got {expert}, expected 0 to {layer.num_experts - 1}")
