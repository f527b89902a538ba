"""What matters in a model of ours: one pass over calibration text, hooks on its layers, and a score for each part.

`shrink` keeps what scores highest. Of hidden channels and latents the score is the mean size of what a norm gives; of
heads and inner channels the mean size of what they hold times the size of the weights behind; of experts REAP's
saliency or the frequency; of layers how far they turn the hidden state. Norms also tell what share of a token's
squares lies in each channel, by which `shrink` makes up for the channels that a norm no longer sees.

Axes: T tokens, D hidden, N heads, E experts, F an expert's width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from deepseek_training.compress.expert_saliency import ExpertSaliency, read_call
from modeling_deepseek.families import find_moe_layers


@dataclasses.dataclass
class LayerImportance:
    """Scores within one layer; None for what the layer does not have.

    Attributes:
        change: 1 - the mean cosine between the hidden states before and after.
        heads: `[N]`.
        kv_latent: Of the keys' and values' latent.
        q_latent: Of the queries'.
        inner: Of a dense feed-forward's width, or of the shared experts'.
        reap: `[E]`.
        frequency: `[E]`.
        expert_inner: `[E, F]`.
    """

    change: float = 0.0
    heads: torch.Tensor | None = None
    kv_latent: torch.Tensor | None = None
    q_latent: torch.Tensor | None = None
    inner: torch.Tensor | None = None
    reap: torch.Tensor | None = None
    frequency: torch.Tensor | None = None
    expert_inner: torch.Tensor | None = None


@dataclasses.dataclass
class Importance:
    """Scores of a whole model.

    Attributes:
        hidden: `[D]`, over all norms.
        energy: By a norm's name, each channel's mean share of a token's squares.
        layers: Layer by layer.
        num_tokens: Calibration tokens.
    """

    hidden: torch.Tensor
    energy: dict[str, torch.Tensor]
    layers: list[LayerImportance]
    num_tokens: int


@torch.no_grad()
def measure_importance(model: PreTrainedModel, blocks: torch.Tensor, *, batch_size: int = 8) -> Importance:
    """Return what matters in a model of ours on some text; the model and its mode stay as they were.

    Args:
        model: A `DeepseekForCausalLM`.
        blocks: `[blocks, S]` token ids.
        batch_size: Blocks a forward pass.
    """
    probe = _Probe(model)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(blocks), batch_size):
            model(input_ids=blocks[start : start + batch_size].long().to(model.device), use_cache=False)
        return probe.finish(blocks.numel())
    finally:
        probe.close()
        model.train(was_training)


class _Probe:
    """The hooks, and the sums that they collect."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self.sums: dict[str, torch.Tensor] = {}
        self.handles: list[Any] = []
        self.layers = list(model.model.layers[: model.config.num_hidden_layers])
        self.saliencies: dict[int, ExpertSaliency] = {}
        moe = {layer.block: layer for layer in find_moe_layers(model)}
        for number, layer in enumerate(self.layers):
            self._hook_layer(number, layer)
            if layer.mlp in moe:
                self.saliencies[number] = ExpertSaliency(moe[layer.mlp], model.config.n_routed_experts)
        self._hook(model.model.norm, lambda module, x, y: self._see_norm("norm", module, x, y, is_hidden=True))

    def _hook_layer(self, number: int, layer: Any) -> None:
        place, attention = f"layers.{number}", layer.self_attn
        norms = {"input_layernorm": layer, "post_attention_layernorm": layer, "kv_a_layernorm": attention}
        norms.update({} if self.config.q_lora_rank is None else {"q_a_layernorm": attention})
        for name, owner in norms.items():
            where = f"{place}.{name}" if owner is layer else f"{place}.self_attn.{name}"
            self._hook(getattr(owner, name), self._norm_hook(where, is_hidden=owner is layer))
        self._hook(attention.o_proj, lambda module, x, y: self._add(f"{place}.heads", self._head_norms(x)))
        mlp = layer.mlp.shared_experts if layer.is_moe else layer.mlp
        self._hook(mlp.down_proj, lambda module, x, y: self._add(f"{place}.inner", _rows(x).abs().sum(0)))
        self.handles.append(layer.register_forward_hook(self._change_hook(place), with_kwargs=True))
        if layer.is_moe:
            hook = self._expert_hook(place)
            self.handles.append(layer.mlp.experts.register_forward_pre_hook(hook, with_kwargs=True))

    def _hook(self, module: nn.Module, see: Callable[[nn.Module, torch.Tensor, torch.Tensor], None]) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            see(module, args[0], output)

        self.handles.append(module.register_forward_hook(hook))

    def _norm_hook(self, where: str, *, is_hidden: bool) -> Callable[[nn.Module, torch.Tensor, torch.Tensor], None]:
        return lambda module, x, y: self._see_norm(where, module, x, y, is_hidden=is_hidden)

    def _see_norm(self, where: str, module: nn.Module, x: torch.Tensor, y: torch.Tensor, *, is_hidden: bool) -> None:
        rows = _rows(x)
        if isinstance(module, nn.LayerNorm):
            rows = rows - rows.mean(-1, keepdim=True)
        squares = rows.square()
        self._add(f"{where}.energy", (squares / squares.sum(-1, keepdim=True).clamp(min=1e-30)).sum(0))
        self._add("hidden" if is_hidden else f"{where}.size", _rows(y).abs().sum(0))

    def _head_norms(self, x: torch.Tensor) -> torch.Tensor:
        rows = _rows(x)
        return rows.view(len(rows), self.config.num_attention_heads, -1).norm(dim=-1).sum(0)

    def _change_hook(self, place: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            self._add(f"{place}.change", (1 - F.cosine_similarity(_rows(before), _rows(output), dim=-1)).sum())

        return hook

    def _expert_hook(self, place: str) -> Callable[..., None]:
        def hook(experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, indices, weights = read_call(args, kwargs)
            sizes = torch.zeros(experts.num_experts, experts.down_proj.shape[-1], dtype=torch.float64)
            for expert in range(experts.num_experts):
                rows = ((indices == expert) & (weights > 0)).any(-1)
                gate, up = F.linear(hidden[rows], experts.gate_up_proj[expert]).chunk(2, dim=-1)
                sizes[expert] = (experts.act_fn(gate) * up).double().abs().sum(0).cpu()
            self._add(f"{place}.expert_inner", sizes)

        return hook

    def _add(self, name: str, value: torch.Tensor) -> None:
        value = value.double().cpu()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def finish(self, num_tokens: int) -> Importance:
        """Return the scores."""
        means = {name: total / num_tokens for name, total in self.sums.items()}
        energy = {name.removesuffix(".energy"): mean for name, mean in means.items() if name.endswith(".energy")}
        layers = [self._layer(number, layer, means) for number, layer in enumerate(self.layers)]
        return Importance(means["hidden"], energy, layers, num_tokens)

    def _layer(self, number: int, layer: Any, means: dict[str, torch.Tensor]) -> LayerImportance:
        place, attention = f"layers.{number}", layer.self_attn
        output = attention.o_proj.weight.double().cpu()
        heads = output.view(len(output), self.config.num_attention_heads, -1).square().sum((0, 2)).sqrt()
        mlp = layer.mlp.shared_experts if layer.is_moe else layer.mlp
        found = LayerImportance(
            change=float(means[f"{place}.change"]),
            heads=means[f"{place}.heads"] * heads,
            kv_latent=means[f"{place}.self_attn.kv_a_layernorm.size"],
            q_latent=means.get(f"{place}.self_attn.q_a_layernorm.size"),
            inner=means[f"{place}.inner"] * mlp.down_proj.weight.double().cpu().norm(dim=0),
        )
        if layer.is_moe:
            saliency = self.saliencies[number]
            behind = layer.mlp.experts.down_proj.double().cpu().norm(dim=1)
            found.reap, found.frequency = saliency.reap, saliency.frequency
            found.expert_inner = means[f"{place}.expert_inner"] * behind
        return found

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        for saliency in self.saliencies.values():
            saliency.close()


def _rows(values: torch.Tensor) -> torch.Tensor:
    """`[T, D]` in fp32."""
    return values.reshape(-1, values.shape[-1]).float()
