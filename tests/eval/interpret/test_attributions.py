"""Attributions add up, the parts of a router's logit add up, and the curves begin and end where they must."""

import numpy as np
import pytest
import torch
from tiny_moe import FAMILIES, make_model, make_passages

from deepseek_eval.interpret.attributions import Attribution, Reading, attribute
from deepseek_eval.interpret.faithfulness import TextCurves, sign_flip_p, sum_up, trace_curves
from deepseek_eval.interpret.router_parts import split_router_logits


@pytest.fixture(params=FAMILIES)
def reading(request):
    return Reading(make_model(request.param), make_passages()[0].token_ids)


def test_attributions_are_complete(reading):
    pytest.importorskip("captum", reason="the extra `explain` is not installed")
    for target in (reading.next_token_target, reading.router_target(1, 2, token=5)):
        found = attribute(reading, target)
        with torch.no_grad(), reading.held():
            ends = [float(target(one.unsqueeze(0))) for one in (reading.embeddings, reading.mean.expand(18, -1))]
        assert abs(sum(found.values) - (ends[0] - ends[1])) < 1e-3 * abs(ends[0] - ends[1])
        assert found.error < 1e-3 and len(found.values) == 18


def test_tokens_behind_the_one_that_chooses_have_no_part(reading):
    pytest.importorskip("captum", reason="the extra `explain` is not installed")
    values = np.array(attribute(reading, reading.router_target(1, 2, token=5)).values)
    assert np.abs(values[:6]).max() > 0 and np.abs(values[6:]).max() == 0


def test_parts_add_up_to_the_routers_logits(reading):
    for place, layer in enumerate(reading.layers):
        parts = split_router_logits(reading, place)
        taken = []
        hook = layer.router.register_forward_hook(lambda router, args, output, to=taken: to.append(output[0]))
        with torch.no_grad():
            reading.model(input_ids=reading.token_ids.unsqueeze(0), use_cache=False)
        hook.remove()
        logits = taken[0] - taken[0].mean(-1, keepdim=True)
        torch.testing.assert_close(parts.parts.sum(-1), logits, rtol=1e-4, atol=1e-4)
        assert parts.names[0] == "embedding" and len(parts.names) == place + 2


def test_curves_begin_and_end_where_they_must(reading):
    values = tuple(np.random.default_rng(0).normal(size=18).tolist())
    curves = trace_curves(reading, Attribution(values, 0.0, 0.0, 0.0, 1))
    with torch.no_grad():
        full = float(reading.next_token_target(reading.embeddings.unsqueeze(0)))
    assert curves.deletion[0] == pytest.approx(full, abs=1e-5) == curves.insertion[-1]
    assert curves.deletion[-1] == pytest.approx(curves.insertion[0], abs=1e-5)


def test_gains_have_the_right_sign_and_chance_is_no_finding():
    good = TextCurves((0.0, -4.0, -4.0), (0.0, -2.0, -4.0), (-4.0, 0.0, 0.0), (-4.0, -2.0, 0.0))
    found = sum_up([good] * 8, [1e-6] * 8)
    assert found.deletion_gain[0] == found.insertion_gain[0] == pytest.approx(1.0)
    assert found.deletion_p < 0.01 and found.insertion_p < 0.01
    assert sign_flip_p([1.0, -1.0, 0.5, -0.5]) > 0.3 and sign_flip_p([-1.0] * 8) > 0.9
    # All eight signs must be as they are: one in 256.
    assert sign_flip_p([1.0] * 8) == pytest.approx(1 / 256, rel=0.5)
