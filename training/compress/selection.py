"""Which experts, channels, heads and layers a student keeps of its teacher, by their importance.

What is kept stays in the teacher's order, so that a student of equal size is the teacher itself.
"""

import dataclasses
from typing import Any, Literal

import torch

from deepseek_training.compress.importance import Importance, LayerImportance

ExpertsBy = Literal["reap", "frequency"]


@dataclasses.dataclass(frozen=True)
class KeptLayer:
    """What a student's layer keeps of the teacher's, by index; None for what the layer does not have.

    Attributes:
        number: The layer's in the teacher.
        heads: Attention heads.
        kv_latent: Channels of the keys' and values' latent.
        q_latent: Channels of the queries' latent.
        inner: Channels of the dense feed-forward, or of the shared experts.
        experts: Routed experts.
        expert_inner: `[kept experts, kept channels]`: of each kept expert its own.
    """

    number: int
    heads: torch.Tensor
    kv_latent: torch.Tensor
    q_latent: torch.Tensor | None
    inner: torch.Tensor
    experts: torch.Tensor | None = None
    expert_inner: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a student keeps of its teacher.

    Attributes:
        hidden: Channels of the hidden state, the same everywhere.
        layers: One for each of the student's.
    """

    hidden: torch.Tensor
    layers: tuple[KeptLayer, ...]


def choose(importance: Importance, teacher: Any, student: Any, *, experts_by: ExpertsBy = "reap") -> Kept:
    """Return what a student of ours keeps.

    Args:
        importance: Of the teacher.
        teacher: Its configuration.
        student: The student's, a slice of it.
        experts_by: Which score ranks the experts.
    """
    numbers = _choose_layers(importance.layers, teacher, student)
    return Kept(
        hidden=keep_best(importance.hidden, student.hidden_size),
        layers=tuple(_choose_within(n, importance.layers[n], student, experts_by) for n in numbers),
    )


def keep_best(scores: torch.Tensor, number: int, num_groups: int = 1) -> torch.Tensor:
    """Return the indices of the highest scores in ascending order; of equal scores the first.

    Args:
        scores: `[C]`.
        number: How many to keep.
        num_groups: Equal stretches of `scores`, which lose equally.
    """
    size = len(scores) // num_groups
    parts = []
    for group in range(num_groups):
        order = scores[group * size : (group + 1) * size].sort(descending=True, stable=True).indices
        parts.append(order[: number // num_groups].sort().values + group * size)
    return torch.cat(parts)


def _choose_layers(layers: list[LayerImportance], teacher: Any, student: Any) -> list[int]:
    """The layers that change the hidden state most, of those without and of those with experts."""
    change = torch.tensor([layer.change for layer in layers])
    dense = min(teacher.first_k_dense_replace, len(layers))
    kept_dense = min(student.first_k_dense_replace, student.num_hidden_layers)
    first = keep_best(change[:dense], kept_dense) if dense else torch.arange(0)
    rest = keep_best(change[dense:], student.num_hidden_layers - kept_dense) + dense
    return [*first.tolist(), *rest.tolist()]


def _choose_within(number: int, layer: LayerImportance, student: Any, experts_by: ExpertsBy) -> KeptLayer:
    heads, latent, inner = _known(layer.heads), _known(layer.kv_latent), _known(layer.inner)
    is_moe = layer.reap is not None
    width = student.moe_intermediate_size * student.n_shared_experts if is_moe else student.intermediate_size
    kept = {
        "heads": keep_best(heads, student.num_attention_heads),
        "kv_latent": keep_best(latent, student.kv_lora_rank),
        "q_latent": None if layer.q_latent is None else keep_best(layer.q_latent, student.q_lora_rank),
        "inner": keep_best(inner, width),
    }
    if not is_moe:
        return KeptLayer(number, **kept)
    scores = _known(layer.reap if experts_by == "reap" else layer.frequency)
    experts = keep_best(scores, student.n_routed_experts, student.n_group)
    channels = [keep_best(_known(layer.expert_inner)[e], student.moe_intermediate_size) for e in experts]
    return KeptLayer(number, **kept, experts=experts, expert_inner=torch.stack(channels))


def _known(scores: torch.Tensor | None) -> torch.Tensor:
    assert scores is not None, "a layer of this kind has these scores"
    return scores
