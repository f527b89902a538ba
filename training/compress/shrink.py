"""A smaller model cut out of a larger one of ours: fewer experts, channels, heads, latents and layers.

`deepseek-moe shrink` and the start ``shrink`` of `distill` call `shrink`. Every tensor of the student is a slice of
the teacher's, but for the norms' weights where channels are cut: a norm then divides by the root of the mean square of
those it still sees, and is scaled so that on average it gives what it gave.

Axes: D hidden, N heads, E experts, F an expert's width, R a latent.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from deepseek_training.compress.importance import Importance
from deepseek_training.compress.selection import ExpertsBy, Kept, KeptLayer, choose
from deepseek_training.compress.student_config import is_uncut, refuse_obstacles

_LAYER = re.compile(r"^(?:model\.)?layers\.(\d+)\.(.*)$")
_NORM = re.compile(r"(layernorm|^model\.norm|^norm)\.(weight|bias)$")


@torch.no_grad()
def shrink(
    model: PreTrainedModel, config: Any, importance: Importance, *, experts_by: ExpertsBy = "reap"
) -> PreTrainedModel:
    """Return a new model with the parts of a larger one that matter most; the larger one stays as it is.

    Args:
        model: The teacher, a `DeepseekForCausalLM`.
        config: The student's configuration, from `student_config`.
        importance: Of the teacher, from `measure_importance`.
        experts_by: Which score ranks the experts.

    Raises:
        ValueError: The student is not a slice of the teacher.
    """
    refuse_obstacles(model.config, config)
    student = type(model)._from_config(config, dtype=model.dtype).eval()
    cut = _Cut(model, config, importance, choose(importance, model.config, config, experts_by=experts_by))
    tensors = {**dict(student.named_parameters()), **dict(student.named_buffers())}
    saved = student.state_dict().keys()
    for name, tensor in tensors.items():
        if name in saved:
            tensor.copy_(cut(name))
    if is_uncut(model.config, config):
        student._carried_mtp = model._carried_mtp
    student.generation_config = model.generation_config
    return student


class _Cut:
    """Makes each of the student's tensors of the teacher's."""

    def __init__(self, model: PreTrainedModel, config: Any, importance: Importance, kept: Kept) -> None:
        self.tensors = model.state_dict()
        self.old, self.new = model.config, config
        self.importance, self.kept = importance, kept

    def __call__(self, name: str) -> torch.Tensor:
        """Return a tensor of the student.

        Args:
            name: As in the student.
        """
        match = _LAYER.match(name)
        if match is None or int(match[1]) >= len(self.kept.layers):  # prediction layers are those of an uncut model
            return self._outside(name) if match is None else self.tensors[name]
        layer, part = self.kept.layers[int(match[1])], match[2]
        source = f"{name[: match.start(1)]}{layer.number}.{part}"
        tensor = self.tensors[source]
        if part.endswith("share.state"):
            return self._share_state(tensor, name)
        if part.startswith("mlp.experts."):
            return self._experts(part, tensor, layer)
        if _NORM.search(part):
            return self._norm(f"layers.{layer.number}.{part.rpartition('.')[0]}", part, tensor, layer)
        return self._linear(part, tensor, layer)

    def _outside(self, name: str) -> torch.Tensor:
        tensor, hidden = self.tensors[name], self.kept.hidden.to(self.tensors[name].device)
        if _NORM.search(name):
            return self._scaled("norm", name, tensor[hidden], hidden)
        return tensor.index_select(-1, hidden)  # embedding and head

    def _share_state(self, state: torch.Tensor, name: str) -> torch.Tensor:
        """The share p goes on where it was, its steering starts again; under other bounds both do."""
        bounds = ("min_experts_per_tok", "num_experts_per_tok", "mean_experts_target", "expert_top_p")
        if any(getattr(self.old, bound) != getattr(self.new, bound) for bound in bounds):
            from modeling_deepseek.expert_share import ExpertShareController

            return ExpertShareController(self.new).state
        if is_uncut(self.old, self.new):
            return state
        return torch.stack([state[0], torch.zeros_like(state[0]), torch.ones_like(state[0])])

    def _experts(self, part: str, tensor: torch.Tensor, layer: KeptLayer) -> torch.Tensor:
        """`gate_up_proj` `[E, 2F, D]` and `down_proj` `[E, D, F]`."""
        experts, inner = _at(tensor, layer.experts), _at(tensor, layer.expert_inner)
        hidden = _at(tensor, self.kept.hidden)
        rows = tensor[experts]
        if part.endswith("down_proj"):
            rows = rows.index_select(1, hidden)
            return rows.gather(2, inner.unsqueeze(1).expand(-1, rows.shape[1], -1))
        both = torch.cat([inner, inner + tensor.shape[1] // 2], 1)
        rows = rows.index_select(2, hidden)
        return rows.gather(1, both.unsqueeze(2).expand(-1, -1, rows.shape[2]))

    def _norm(self, where: str, part: str, tensor: torch.Tensor, layer: KeptLayer) -> torch.Tensor:
        if "kv_a_layernorm" in part:
            channels = layer.kv_latent
        elif "q_a_layernorm" in part:
            channels = layer.q_latent
        else:
            channels = self.kept.hidden
        channels = _at(tensor, channels)
        return self._scaled(where, part, tensor[channels], channels)

    def _scaled(self, where: str, part: str, kept: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
        """The norm's weight times root(kept share of the squares * channels before / channels now)."""
        energy = self.importance.energy[where]
        if len(channels) == len(energy) or part.endswith("bias"):
            return kept
        share = float(energy[channels.cpu()].sum())
        return (kept.double() * (share * len(energy) / len(channels)) ** 0.5).to(kept.dtype)

    def _linear(self, part: str, tensor: torch.Tensor, layer: KeptLayer) -> torch.Tensor:
        module, _, kind = part.rpartition(".")
        axes = _ROUTER_AXES[kind] if module == "mlp.gate" else _AXES[module.rpartition(".")[2]]
        for axis, rule in enumerate(axes[: tensor.ndim]):
            if rule is not None:
                tensor = tensor.index_select(axis, _at(tensor, rule(self, layer)))
        return tensor

    def per_head(self, layer: KeptLayer, width: int) -> torch.Tensor:
        """Indices of the kept heads' rows, of so many each."""
        return (layer.heads.unsqueeze(1) * width + torch.arange(width)).flatten()

    def with_rope(self, layer: KeptLayer) -> torch.Tensor:
        """Indices of the kept latent's rows and of the rotated key's behind them."""
        rope = torch.arange(self.old.qk_rope_head_dim) + self.old.kv_lora_rank
        return torch.cat([layer.kv_latent, rope])


_Rule = Callable[[_Cut, KeptLayer], Any] | None


def _hidden(cut: _Cut, layer: KeptLayer) -> Any:
    return cut.kept.hidden


def _inner(cut: _Cut, layer: KeptLayer) -> Any:
    return layer.inner


def _queries(cut: _Cut, layer: KeptLayer) -> Any:
    return cut.per_head(layer, cut.old.qk_nope_head_dim + cut.old.qk_rope_head_dim)


def _kept_experts(cut: _Cut, layer: KeptLayer) -> Any:
    return layer.experts


# By the name of a linear layer: what is kept of its outputs, and of its inputs. None: all.
_AXES: dict[str, tuple[_Rule, ...]] = {
    "q_proj": (_queries, _hidden),
    "q_a_proj": (lambda cut, layer: layer.q_latent, _hidden),
    "q_b_proj": (_queries, lambda cut, layer: layer.q_latent),
    "kv_a_proj_with_mqa": (lambda cut, layer: cut.with_rope(layer), _hidden),
    "kv_b_proj": (
        lambda cut, layer: cut.per_head(layer, cut.old.qk_nope_head_dim + cut.old.v_head_dim),
        lambda cut, layer: layer.kv_latent,
    ),
    "o_proj": (_hidden, lambda cut, layer: cut.per_head(layer, cut.old.v_head_dim)),
    "gate_proj": (_inner, _hidden),
    "up_proj": (_inner, _hidden),
    "down_proj": (_hidden, _inner),
}
_ROUTER_AXES: dict[str, tuple[_Rule, ...]] = {
    "weight": (_kept_experts, _hidden),
    "query_weight": (None, _hidden),
    "expert_keys": (_kept_experts, None),
    "e_score_correction_bias": (_kept_experts,),
}


def _at(tensor: torch.Tensor, indices: torch.Tensor | None) -> torch.Tensor:
    assert indices is not None, "a tensor of this kind has such an axis"
    return indices.to(tensor.device)
