"""A tiny model of every experts class of transformers: routing is read, an expert masked, attributions are complete.

What does not work is refused in one line that names the router, or told by the completeness error beside the figures.
"""

import numpy as np
import pytest
import torch
from tiny_families import build_tiny, find_experts_classes

from deepseek_eval.interpret.ablation import estimate_effects
from deepseek_eval.interpret.attributions import MOST_ERROR, Reading, attribute
from deepseek_eval.interpret.passages import Passage
from deepseek_eval.interpret.routed_tokens import find_layers, read_routing
from deepseek_eval.interpret.router_parts import split_router_logits
from deepseek_eval.interpret.steered_router import masked_expert


def try_family(module: str, name: str) -> set[str]:
    """What works with one class."""
    model, rng = build_tiny(module, name), np.random.default_rng(0)
    passages = [Passage("ab"[row % 2], row, rng.integers(5, 90, 12)) for row in range(4)]
    try:
        routed = read_routing(model, passages)
    except (ValueError, AttributeError):  # two routers of which one is idle; a talker without embeddings
        return set()
    done, layers = {"atlas"}, find_layers(model)
    expert = int(routed.experts[-1].max())
    try:
        with masked_expert(layers[-1], expert):
            assert not (read_routing(model, passages).experts[-1] == expert).any()
        done.add("masked")
    except ValueError as error:
        assert type(layers[-1].router).__name__ in str(error) and "\n" not in str(error)
    if "Model" in type(model).__name__ and not hasattr(model, "lm_head"):
        return done | {"no head"}
    assert all(np.isfinite(table).all() for table in estimate_effects(model, layers, passages))
    try:
        reading = Reading(model, passages[0].token_ids)
        if attribute(reading, reading.next_token_target).error < MOST_ERROR:
            done.add("complete")
    except ValueError as error:  # DeepSeek-V4 routes by token ids, which embeddings have none of
        assert "a language model that reads embeddings in place of tokens" in str(error) and "\n" not in str(error)
        return done
    return done | ({"parts"} if split_router_logits(reading, len(layers) - 1) is not None else set())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_most_families_are_explained():
    pytest.importorskip("captum", reason="the extra `explain` is not installed")
    torch.manual_seed(0)
    found = [try_family(module, name) for module, name in find_experts_classes()]
    counts = {what: sum(what in one for one in found) for what in ("atlas", "masked", "no head", "complete", "parts")}
    print(len(found), counts)
    assert counts["atlas"] >= 63 and counts["masked"] >= 61
    assert counts["complete"] >= 44 and counts["parts"] >= 40
