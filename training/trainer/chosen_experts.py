"""Expert-specialized fine-tuning (ESFT): in each layer the experts that a domain's text goes to, and only these train.

`adapt` and `update` call it where a recipe sets `esft_top_p`. Of every layer the fewest experts are taken whose scores
on a sample of the text reach that share:

    gate      s_e = sum_t w_te / sum_t sum_e w_te,     w = the router's weights of the chosen experts
    tokens    s_e = tokens routed to e / all routed slots

All else is frozen: attention, embeddings, routers with their bias and expert share, the other experts. Experts are
slices of fused tensors, so a step computes the gradient of all of a layer's experts and masks it; `RowAdamW` has
weights, moments and decay of the chosen slices alone, and never writes another.

Axes: T tokens, E experts.

Reference:
    Wang et al. 2024, arXiv 2407.01906, equations 5 to 8 (p = 0.2 there for tokens).
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from deepseek_training.recipes.pretrain_and_adapt import EsftSettings
from modeling_deepseek.families import MoeLayer, find_moe_layers
from modeling_deepseek.router_output import read_choice

ExpertScore = Literal["gate", "tokens"]
# The paper's sample.
SAMPLE_TOKENS = 8192
_BATCH_SIZE = 8


@dataclasses.dataclass(frozen=True)
class ChosenLayer:
    """The experts of one layer that train.

    Attributes:
        name: The layer's.
        experts: Their numbers, ascending.
        scores: `[E]`, of all experts; they sum to 1.
    """

    name: str
    experts: tuple[int, ...]
    scores: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class ChosenRows:
    """Slices of one fused parameter that train.

    Attributes:
        name: The parameter's.
        parameter: `[E, ...]`.
        rows: `[n]` int64, the experts.
    """

    name: str
    parameter: nn.Parameter
    rows: torch.Tensor

    @property
    def num_trained(self) -> int:
        """Numbers that train."""
        return self.parameter[0].numel() * len(self.rows)


@dataclasses.dataclass(frozen=True)
class Esft:
    """What trains.

    Attributes:
        rows: The slices; none where whole parameters train.
        details: What the summary tells of it.
    """

    rows: Sequence[ChosenRows] = ()
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def num_trained(self) -> int | None:
        """Numbers that train; None where whole parameters do."""
        return sum(one.num_trained for one in self.rows) or None


def prepare_esft(recipe: EsftSettings, model: PreTrainedModel, parts: Sequence[Any]) -> Esft:
    """Choose and freeze as a recipe says.

    Args:
        recipe: The settings.
        model: What training starts from. On the meta device nothing is chosen.
        parts: The domain's blocks, source by source; a sample of each is scored.

    Raises:
        ValueError: As for `choose_experts` and `freeze_others`.
    """
    if recipe.esft_top_p is None or model.device.type == "meta":
        return Esft()
    wanted = max(1, SAMPLE_TOKENS // recipe.sequence_length // len(parts))
    sample = [part[int(place)]["input_ids"] for part in parts for place in _spread(len(part), wanted)]
    score = recipe.esft_score or "tokens"
    layers = choose_experts(model, torch.stack(sample), top_p=recipe.esft_top_p, score=score)
    chosen = freeze_others(model, layers)
    details = {
        "esft_score": score,
        "chosen_experts": {layer.name: list(layer.experts) for layer in layers},
        "num_trained_parameters": sum(one.num_trained for one in chosen),
    }
    return Esft(chosen, details)


def _spread(size: int, number: int) -> torch.Tensor:
    return torch.linspace(0, size - 1, min(size, number), dtype=torch.float64).long()


@torch.no_grad()
def choose_experts(
    model: PreTrainedModel, blocks: torch.Tensor, *, top_p: float, score: ExpertScore = "tokens"
) -> list[ChosenLayer]:
    """Return each layer's experts with the highest scores that together reach `top_p`.

    Args:
        model: Of any family of `modeling_deepseek/families.py`; its mode is left as it was.
        blocks: `[N, S]` token ids of the text.
        top_p: In (0, 1]; 1 takes every expert that was used.
        score: What scores an expert.

    Raises:
        ValueError: There are no routed experts, or a router does not tell what the score needs.
    """
    layers = [layer for layer in find_moe_layers(model) if layer.experts is not None and layer.num_experts]
    if not layers:
        raise ValueError(
            f"esft_top_p: got {top_p} for {type(model).__name__}, expected null; it has no routed experts"
        )
    sums = [torch.zeros(int(layer.num_experts or 0), dtype=torch.float64) for layer in layers]
    handles = [
        layer.router.register_forward_hook(_adder(layer, into, score))
        for layer, into in zip(layers, sums, strict=True)
    ]
    was_training = model.training
    model.eval()
    try:
        for batch in blocks.split(_BATCH_SIZE):
            model(input_ids=batch.long().to(model.device), use_cache=False)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    found = [_choose(layer.name, into, top_p) for layer, into in zip(layers, sums, strict=True) if into.sum() > 0]
    if not found:
        raise ValueError(
            f"esft_top_p: got {top_p} for {type(model).__name__}, whose routers did not tell their choice"
        )
    return found


def _adder(layer: MoeLayer, into: torch.Tensor, score: ExpertScore) -> Callable[..., None]:
    def add(router: nn.Module, args: Any, output: Any) -> None:
        choice = read_choice(output, layer.logits_place)
        if choice is None or (score == "gate" and choice.topk_weights is None):
            what = "their weights" if score == "gate" else "the chosen experts"
            raise ValueError(
                f"esft_score: got {score!r} for {type(router).__name__}, expected a router that tells {what}"
            )
        if score == "gate":
            assert choice.topk_weights is not None and choice.topk_indices is not None
            weights = (choice.topk_weights * choice.is_used).double().cpu()
            into.index_add_(0, choice.topk_indices.clamp(max=len(into) - 1).cpu().flatten(), weights.flatten())
        else:
            into.add_(choice.tokens_per_expert(None, len(into)).double().cpu())

    return add


def _choose(name: str, sums: torch.Tensor, top_p: float) -> ChosenLayer:
    scores = sums / sums.sum()
    order = scores.argsort(descending=True, stable=True)
    # Reached within rounding: twice 0.1 is to be enough for 0.2.
    number = int((scores[order].cumsum(0) < top_p - 1e-9).sum()) + 1
    kept = [int(expert) for expert in order[:number] if scores[expert] > 0]
    return ChosenLayer(name, tuple(sorted(kept)), tuple(scores.tolist()))


def freeze_others(model: PreTrainedModel, chosen: Sequence[ChosenLayer]) -> list[ChosenRows]:
    """Freeze all but the chosen experts, the routers' controllers too, and return what trains.

    Args:
        model: Changed in place: what requires a gradient, and the routers' target of experts per token.
        chosen: From `choose_experts`.

    Raises:
        ValueError: A layer's experts are not slices of fused tensors.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers = find_moe_layers(model)
    for layer in layers:
        share: Any = getattr(layer.router, "share", None)
        if getattr(share, "target", None) is not None:
            share.target = None  # p stays where it is; the configuration, and so what is saved, keeps its target
    by_name, found = {layer.name: layer for layer in layers}, []
    for one in chosen:
        layer = by_name[one.name]
        parameters = [] if layer.experts is None else list(layer.experts.named_parameters(recurse=False))
        fused = [(name, value) for name, value in parameters if value.shape[0] == layer.num_experts]
        if not any(value.dim() == 3 for _, value in fused):
            raise ValueError(
                f"esft_top_p: got {type(layer.experts).__name__} in {one.name}, expected experts in fused tensors"
            )
        rows = torch.tensor(one.experts, dtype=torch.int64)
        for name, value in fused:
            value.requires_grad_(True)
            value.register_hook(_mask(rows))
            found.append(ChosenRows(f"{one.name}.experts.{name}", value, rows))
    return found


def _mask(rows: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Other experts' gradients are 0, so that the norm that clips is of what trains."""

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        kept = rows.to(gradient.device)
        return torch.zeros_like(gradient).index_copy_(0, kept, gradient.index_select(0, kept))

    return hook


class RowAdamW(torch.optim.AdamW):
    """AdamW of some slices of parameters; its state is as large as these, and the rest is never written.

    Args:
        chosen: The slices.
        **settings: Of AdamW.
    """

    def __init__(self, chosen: Iterable[ChosenRows], **settings: Any) -> None:
        self.chosen = list(chosen)
        self._slices = [nn.Parameter(one.parameter.detach()[one.rows.to(one.parameter.device)]) for one in self.chosen]
        super().__init__(self._slices, **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Take a step from the parameters' gradients.

        Args:
            closure: Not used; for the signature.
        """
        for part, one in zip(self._slices, self.chosen, strict=True):
            rows, gradient = one.rows.to(part.device), one.parameter.grad
            part.copy_(one.parameter.index_select(0, rows))  # a checkpoint may have been loaded since
            part.grad = None if gradient is None else gradient.index_select(0, rows)
        super().step()
        for part, one in zip(self._slices, self.chosen, strict=True):
            one.parameter.index_copy_(0, one.rows.to(part.device), part)
            part.grad = None


def check_esft(trainer: Trainer) -> None:
    """Refuse what `RowAdamW`, which needs whole tensors, cannot train.

    Args:
        trainer: Before its optimizer is made.

    Raises:
        ValueError: The model is sharded over processes.
    """
    if getattr(trainer, "is_sharded", False):
        raise ValueError("esft_top_p: got a model that is sharded over processes, expected null")
