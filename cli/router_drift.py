"""How far an update moved the routers: KL of expert load on the same held-out text, less what chance gives.

`update` records it. Both models read the same passages, so a difference is the routers' alone; monitoring's KL
compares the loads, and its null is drawn by documents, whose two loads change sides at random. Joined here, for the
counting belongs to `deepseek_eval` and the figure to `deepseek_serving`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from deepseek_eval.interpret.passages import Passage
from deepseek_eval.interpret.routed_tokens import RoutedTokens, read_routing
from deepseek_serving.monitoring.drift import kl_nats, p_value
from deepseek_training.continual.held_out_units import HeldOutUnits
from modeling_deepseek.families import find_moe_layers

_LENGTH = 128
_MOST_UNITS = 64
_NUM_DRAWS = 1000


def measure_router_drift(
    old: PreTrainedModel, new: PreTrainedModel, sets: Sequence[HeldOutUnits]
) -> list[dict[str, Any]]:
    """Return a row for each set and layer: raw KL in nats, corrected by the null's mean, and its p-value.

    None of a dense model, and none where a router does not tell its choice.

    Args:
        old: The model before.
        new: The model after.
        sets: Held-out text.
    """
    layers = [layer.name for layer in find_moe_layers(old)]
    rows = []
    for one in sets if layers else []:
        passages = [
            Passage(one.name, number, document[:_LENGTH].astype(np.int64))
            for number, document in enumerate(one.documents[:_MOST_UNITS])
            if len(document) > 1
        ]
        try:
            before, after = (_loads(read_routing(model.eval(), passages)) for model in (old, new))
        except ValueError:  # a router that does not tell its choice
            return []
        for layer, counts, now in zip(layers, before, after, strict=True):
            raw, corrected, p = compare_loads(counts, now)
            rows.append({"dataset": one.name, "layer": layer, "raw": raw, "corrected": corrected, "p": p})
    return rows


def _loads(routed: RoutedTokens) -> list[np.ndarray]:
    """By layer `[N, E]`: slots of each passage by expert."""
    num_passages = int(routed.passages.max()) + 1
    found = []
    for experts, size in zip(routed.experts, routed.num_experts, strict=True):
        counts: np.ndarray = np.zeros((num_passages, size), np.int64)
        token, slot = np.nonzero(experts >= 0)
        np.add.at(counts, (routed.passages[token], experts[token, slot]), 1)
        found.append(counts)
    return found


def compare_loads(before: np.ndarray, after: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Return KL(after || before) of summed loads in nats, the same less the null's mean, and the p-value.

    Args:
        before: `[N, E]` counts by document.
        after: The same of the other model.
        seed: Of the null's draws.
    """
    raw = float(kl_nats(after.sum(0), before.sum(0)))
    swapped = np.random.default_rng(seed).random((_NUM_DRAWS, len(before))) < 0.5
    difference = (after - before).astype(np.float64)
    moved = swapped.astype(np.float64) @ difference
    null = np.sort(kl_nats(after.sum(0) - moved, before.sum(0) + moved))
    return raw, raw - float(null.mean()), p_value(raw, null)
