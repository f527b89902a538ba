"""Where a router's logits come from: each part of the residual stream times the expert's row of the gate, exactly.

    logit_e = sum over parts of  w_e . (scale * part)      scale = x / h, elementwise, of router input x and stream h

The parts are the embedding, each earlier layer, and the attention in front of the router; their sum is the stream h.
The scale of an RMSNorm is one number per token times the norm's weight, so the parts are what their names say. Of a
norm that also shifts, or of a gate that is not linear, nothing is told.

Axes: S tokens, D hidden, E experts, P parts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from deepseek_eval.interpret.attributions import Reading
from modeling_deepseek.families import MoeLayer

_TOLERANCE = 1e-3


@dataclass(frozen=True)
class RouterParts:
    """The parts of one layer's router logits.

    Attributes:
        names: Of the P parts.
        parts: `[S, E, P]`: what each adds to each expert's logit, the mean over experts taken off.
        logits: `[S, E]`, likewise.
        error: Largest |sum of parts - logit|, over the logits' spread.
    """

    names: tuple[str, ...]
    parts: torch.Tensor
    logits: torch.Tensor
    error: float


@torch.no_grad()
def split_router_logits(reading: Reading, place: int) -> RouterParts | None:
    """Return the parts of a layer's router logits; None where they cannot be told.

    Args:
        reading: The text.
        place: Of the layer among those with routed experts.
    """
    layer = reading.layers[place]
    gate = _gate_of(layer)
    blocks = _decoder_layers(reading.model, layer)
    if gate is None or blocks is None:
        return None
    streams, names, seen = [], [], {}

    def take(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else kwargs.get("hidden_states")
            if isinstance(value, torch.Tensor) and name not in seen:
                seen[name] = value.detach().reshape(-1, value.shape[-1]).float()

        return hook

    norms: list[tuple[torch.Tensor, torch.Tensor]] = []

    def pair(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
            norms.append((args[0].detach().flatten(0, -2).float(), output.detach().flatten(0, -2).float()))

    hooks = [block.register_forward_pre_hook(take(f"layer {n}"), with_kwargs=True) for n, block in enumerate(blocks)]
    hooks.append(layer.router.register_forward_pre_hook(take("router"), with_kwargs=True))
    hooks += [child.register_forward_hook(pair) for child in blocks[-1].children() if child is not layer.block]
    logits: list[torch.Tensor] = []
    hooks.append(layer.router.register_forward_hook(lambda _, args, output: logits.append(output[layer.logits_place])))
    try:
        reading.model(inputs_embeds=reading.embeddings.unsqueeze(0), use_cache=False)
    finally:
        for one in hooks:
            one.remove()
    stream = next((h for h, x in norms if x.shape == seen["router"].shape and torch.equal(x, seen["router"])), None)
    if stream is None or any(f"layer {n}" not in seen for n in range(len(blocks))):
        return None
    scale = seen["router"] / torch.where(stream.abs() < 1e-12, torch.full_like(stream, 1e-12), stream)
    if not _is_rms(scale, stream):
        return None
    streams = [seen[f"layer {n}"] for n in range(len(blocks))] + [stream]
    if any(one.shape != stream.shape for one in streams):  # several streams, as hyper-connections have
        return None
    names = ["embedding", *(f"layer {n}" for n in range(len(blocks) - 1)), f"attention {len(blocks) - 1}"]
    contributions = torch.stack([streams[0], *(b - a for a, b in pairwise(streams))])
    gate = gate - gate.mean(0)
    parts = torch.einsum("psd,sd,ed->sep", contributions, scale, gate)
    centered = logits[0].reshape(len(stream), -1).float()
    centered = centered - centered.mean(-1, keepdim=True)
    error = float((parts.sum(-1) - centered).abs().max() / centered.std().clamp(min=1e-9))
    return RouterParts(tuple(names), parts, centered, error) if error < _TOLERANCE * 10 else None


def _gate_of(layer: MoeLayer) -> torch.Tensor | None:
    """[E, D]: the rows of a linear gate, or query and keys multiplied out; None of another router."""
    router = layer.router
    query, keys = (getattr(router, name, None) for name in ("query_weight", "expert_keys"))
    if isinstance(query, torch.Tensor) and isinstance(keys, torch.Tensor):
        return keys.float() @ query.float() / query.shape[0] ** 0.5
    weight = getattr(router, "weight", None)
    is_table = isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.shape[0] == layer.num_experts
    return weight.detach().float() if is_table and weight is not None else None


def _decoder_layers(model: nn.Module, layer: MoeLayer) -> list[nn.Module] | None:
    """The modules of the list that the block lies in, up to its own."""
    modules = dict(model.named_modules())
    parts = layer.name.split(".")
    for end in range(1, len(parts)):
        parent = modules[".".join(parts[:end])]
        if isinstance(parent, nn.ModuleList) and parts[end].isdigit():
            return list(parent)[: int(parts[end]) + 1]
    return None


def _is_rms(scale: torch.Tensor, stream: torch.Tensor) -> bool:
    """Whether the scales of all tokens are one vector times a number each, as an RMSNorm's are."""
    is_sure = stream.abs().min(0).values > 1e-4
    if int(is_sure.sum()) < 2 or len(scale) < 2:
        return len(scale) > 1
    chosen = scale[:, is_sure]
    shape = chosen / chosen.norm(dim=1, keepdim=True)
    return bool((shape - shape[0]).abs().max() < _TOLERANCE)
