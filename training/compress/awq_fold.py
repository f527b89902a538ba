"""Where the scale of a MoE block's input goes: out of the norm before it, into all that reads what the norm gives.

That is the experts, the shared experts, **and the router**: left out, it would choose other experts. Norm and readers
are found by following the tensor in one pass of a decoder layer, and believed only after the proof of a fold by
powers of two, which must not change one bit of the layer's output.

Axes: H hidden, E experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modeling_deepseek.families import MoeLayer


@dataclass(frozen=True)
class InputFold:
    """One layer's place for the scale of its MoE block's input.

    Attributes:
        norm: What gives the input.
        readers: Parameters `[..., H]` outside the experts that read it: the router's, shared experts', gates'.
        experts: The fused experts, whose `gate_up_proj` `[E, 2I, H]` reads it.
    """

    norm: nn.Module
    readers: tuple[nn.Parameter, ...]
    experts: nn.Module

    @torch.no_grad()
    def apply(self, scale: Tensor) -> None:
        """Divide the norm's output by a scale and multiply every reader by it.

        Args:
            scale: `[H]`, positive.
        """
        for parameter in (self.norm.weight, getattr(self.norm, "bias", None)):
            if isinstance(parameter, Tensor):
                parameter.data.copy_(parameter.data.float() / scale)
        for reader in self.readers:
            reader.data.copy_(reader.data.float() * scale)
        for matrix in self.experts.gate_up_proj.data:  # one expert in fp32 at a time
            matrix.copy_(matrix.float() * scale)


@torch.no_grad()
def find_fold(layer: MoeLayer, decoder: nn.Module, run: Callable[[], Tensor]) -> InputFold:
    """Return where a layer's scale goes.

    Args:
        layer: Router and experts.
        decoder: The decoder layer around them.
        run: Runs the decoder layer on some tokens and returns its output.

    Raises:
        ValueError: No norm gives the block's input, or others read it too.
    """
    assert layer.experts is not None
    gives: list[tuple[int, nn.Module]] = []
    reads: dict[str, list[int]] = {}
    with _watch(layer, decoder, gives, reads):
        before = run()
    width = layer.experts.gate_up_proj.shape[2]
    places = reads.pop("", [])
    norms = [module for place, module in gives if place in places and _is_norm(module, width)]
    if len(norms) != 1:
        raise ValueError(_refusal(layer, f"got {len(norms)} norms that give the experts' input, expected 1"))
    modules = dict(layer.block.named_modules())
    found = [parameter for name in reads for parameter in _readers(modules[name], width)]
    fold = InputFold(norms[0], tuple(found), layer.experts)
    if not any(parameter is one for parameter in layer.router.parameters() for one in fold.readers):
        raise ValueError(_refusal(layer, "got a router that does not read the experts' input"))
    scale = torch.exp2(torch.arange(width) % 3 - 1.0).to(before.device)
    fold.apply(scale)
    after = run()
    fold.apply(1 / scale)
    if not torch.equal(before, after):
        raise ValueError(_refusal(layer, "got a norm whose output others read too, or that does not just multiply"))
    return fold


@contextmanager
def _watch(
    layer: MoeLayer, decoder: nn.Module, gives: list[tuple[int, nn.Module]], reads: dict[str, list[int]]
) -> Iterator[None]:
    """Note which modules give and read which memory, the block's own input under ``""``."""
    kept = []  # or memory that is let go of would be given out again

    def see(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if tensors and (name == "" or tensors[0].data_ptr() in reads.get("", [])):
                reads.setdefault(name, []).append(tensors[0].data_ptr())
                kept.append(tensors[0])

        return hook

    def note(module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            gives.append((output.data_ptr(), module))
            kept.append(output)

    inside = {id(module) for module in layer.experts.modules()} if layer.experts is not None else set()
    handles = [module.register_forward_hook(note) for module in decoder.modules()]
    for name, module in layer.block.named_modules():
        if id(module) not in inside:
            handles.append(module.register_forward_pre_hook(see(name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_norm(module: nn.Module, width: int) -> bool:
    weight = module._parameters.get("weight")
    return isinstance(weight, Tensor) and tuple(weight.shape) == (width,)


def _readers(module: nn.Module, width: int) -> list[nn.Parameter]:
    """A module's own matrices over its input; of a router with keys the queries' only."""
    own = {name: one for name, one in module._parameters.items() if one is not None and one.dim() == 2}
    if "query_weight" in own:
        return [own["query_weight"]]
    return [one for one in own.values() if one.shape[1] == width]


def _refusal(layer: MoeLayer, why: str) -> str:
    return f"model: {layer.name} ({type(layer.block).__name__}): {why}; AWQ has nowhere to put the scales"
