"""Which experts take image tokens, which take audio tokens, and which take text.

Axes: T tokens of all questions, E experts, C kinds of token.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from deepseek_eval.interpret.information import mutual_information
from deepseek_eval.interpret.routed_tokens import choice_of, find_layers, layer_number, slots_of
from deepseek_eval.model_loading import LoadedModel
from deepseek_records.media.asking import make_batch
from deepseek_records.media.item import MediaItem

KINDS = ("text", "image", "audio")
_NUM_SHUFFLES = 50


@torch.no_grad()
def route_media(loaded: LoadedModel, items: Sequence[MediaItem], batch_size: int) -> dict[str, Any]:
    """Return how often each expert takes a kind of token, and how much that tells.

    Args:
        loaded: Model and processor.
        items: Questions with images and sounds.
        batch_size: Questions at once.

    Returns:
        ``kinds`` and ``num_tokens`` `[C]`, and per layer ``layer``, ``rates`` `[C][E]` (share of the kind's tokens
        that take the expert), ``bits`` of mutual information of one choice and the kind, and ``bits_by_chance``: the
        mean where each question's kinds are shuffled.

    Raises:
        ValueError: The model is dense, or a router does not tell its choice per token.
    """
    model, layers = loaded.model, find_layers(loaded.model)
    chosen: list[list[np.ndarray]] = [[] for _ in layers]
    widths = [0] * len(layers)
    is_token = torch.zeros(0, dtype=torch.bool)

    def note(number: int) -> Any:
        def hook(router: Any, args: Any, output: Any) -> None:
            choice = choice_of(layers[number], output)
            widths[number] = choice.num_experts
            chosen[number].append(slots_of(choice)[is_token.to(choice.router_logits.device)].cpu().numpy())

        return hook

    kinds, rows = [], []
    hooks = [layer.router.register_forward_hook(note(number)) for number, layer in enumerate(layers)]
    try:
        for start in range(0, len(items), batch_size):
            batch = make_batch(items[start : start + batch_size], loaded.processor)
            is_token = batch["attention_mask"].bool().flatten()
            of_batch = kinds_of(batch["input_ids"], model.config)
            kinds.append(of_batch.flatten()[is_token].numpy())
            numbers = torch.arange(len(of_batch)).unsqueeze(1).expand_as(of_batch)
            rows.append(start + numbers.flatten()[is_token].numpy())
            model(**{name: value.to(model.device) for name, value in batch.items()}, use_cache=False)
    finally:
        for one in hooks:
            one.remove()
    kind, row = np.concatenate(kinds), np.concatenate(rows)
    present = [number for number in range(len(KINDS)) if (kind == number).any()]
    kind = np.asarray(np.searchsorted(present, kind))
    return {
        "kinds": [KINDS[number] for number in present],
        "num_tokens": np.bincount(kind, minlength=len(present)).tolist(),
        "num_questions": len(items),
        "layers": [
            {"layer": layer_number(layer), **_tell(np.concatenate(parts), width, kind, row, len(present))}
            for layer, parts, width in zip(layers, chosen, widths, strict=True)
        ],
    }


def kinds_of(input_ids: torch.Tensor, config: Any) -> torch.Tensor:
    """Return each token's place in `KINDS`.

    Args:
        input_ids: Of any shape.
        config: Of the model, which names image and audio tokens.
    """
    found = torch.zeros_like(input_ids)
    for number, token_id in ((1, config.image_token_id), (2, config.audio_token_id)):
        if token_id is not None:
            found[input_ids == token_id] = number
    return found


def _tell(experts: np.ndarray, width: int, kind: np.ndarray, row: np.ndarray, num_kinds: int) -> dict[str, Any]:
    """Of `[T, K]` chosen experts, -1 where a slot is unused."""
    counts = _count(experts, width, kind, num_kinds)
    sizes = np.bincount(kind, minlength=num_kinds)
    rng = np.random.default_rng(0)
    shuffled = []
    for _ in range(_NUM_SHUFFLES):
        moved = np.empty_like(kind)
        moved[np.argsort(row, kind="stable")] = kind[np.lexsort((rng.random(len(kind)), row))]
        shuffled.append(float(mutual_information(_count(experts, width, moved, num_kinds))))
    return {
        "rates": (counts / sizes[:, None]).tolist(),
        "bits": float(mutual_information(counts)),
        "bits_by_chance": float(np.mean(shuffled)),
    }


def _count(experts: np.ndarray, width: int, kind: np.ndarray, num_kinds: int) -> np.ndarray:
    """[C, E]."""
    used = experts >= 0
    flat = np.repeat(kind, experts.shape[1]).reshape(experts.shape)[used] * width + experts[used]
    return np.bincount(flat, minlength=num_kinds * width).reshape(num_kinds, width)
