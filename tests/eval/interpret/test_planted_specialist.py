"""One expert serves one domain only, by construction: the atlas names it, and masking it hurts that domain alone."""

import numpy as np
import pytest
import torch
from tiny_moe import Letters, make_model

from deepseek_eval.interpret.ablation import estimate_effects, measure_effects, rank_experts, score_passages
from deepseek_eval.interpret.atlas import make_atlas
from deepseek_eval.interpret.expert_sets import equally_busy, masked_experts, measure_sets, preferred
from deepseek_eval.interpret.passages import Passage
from deepseek_eval.interpret.routed_tokens import find_layers, read_routing

SPECIALIST = 4


def passages_of(rng: np.random.Generator) -> list[Passage]:
    """Domain a: each token is followed by the next of 3 to 31; domain b: likewise of 32 to 60."""
    rows = []
    for number in range(16):
        low, size = ((3, 29), (32, 29))[number % 2]
        start = rng.integers(size)
        rows.append(Passage("ab"[number % 2], number, np.array([1, *((start + np.arange(20)) % size + low)])))
    return rows


@pytest.fixture(scope="module")
def planted():
    """Mixtral with one expert per token; tokens of domain b go to the specialist, others to the rest."""
    model = make_model("mixtral")
    layer = find_layers(model)[1]
    layer.router.top_k = 1
    model.model.layers[0].mlp.gate.top_k = 1
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = -3.0
        model.model.embed_tokens.weight[32:, 0] = 3.0
        layer.router.weight[:, 0] = -3.0
        layer.router.weight[SPECIALIST, 0] = 3.0
    trained = list(layer.experts.parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is one for one in trained))
    optimizer = torch.optim.Adam(trained, lr=0.02)
    passages = passages_of(np.random.default_rng(0))
    ids = torch.from_numpy(np.stack([passage.token_ids for passage in passages]))
    for _ in range(25):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    return model, passages


def test_the_atlas_names_it(planted):
    model, passages = planted
    atlas = make_atlas(read_routing(model, passages), passages, Letters(), ["0", "1"])
    layer = atlas.layers[1]
    found = layer.experts[SPECIALIST]
    assert found.domain == "b" and found.lifts[1] > 1.9 and found.q_value < 0.01
    assert found.rates[0] < 0.1 and found.rates[1] > 0.9
    assert layer.domain.bits > 0.8 and layer.domain.p_value < 0.01 and layer.domain.chance < 0.2
    assert layer.domain.bits > 10 * layer.domain.stderr
    assert all(token.text.isalnum() for token in found.tokens) and found.tokens


def test_masking_it_hurts_its_domain_alone(planted):
    model, passages = planted
    layers = find_layers(model)
    estimates = estimate_effects(model, layers, passages)
    assert SPECIALIST in [expert for place, expert in rank_experts(estimates)[:4] if place == 1]
    effects = measure_effects(model, layers, passages, [(1, expert) for expert in range(6)], estimates)
    effect = effects[SPECIALIST]
    assert effect.change[1] > 1.0 and effect.change[1] > 10 * effect.stderr[1] and effect.q_value[1] < 1e-6
    assert abs(effect.change[0]) < 0.1 * effect.change[1]
    others = [one.change[1] for one in effects if one.expert != SPECIALIST]
    assert effect.change[1] > 3 * max(map(abs, others))


def test_shuffled_domains_tell_nothing(planted):
    """The same tokens under domain names that have nothing to do with them: chance level, and no finding."""
    model, passages = planted
    renamed = [Passage("cd"[row // 2 % 2], one.document, one.token_ids) for row, one in enumerate(passages)]
    layer = make_atlas(read_routing(model, renamed), renamed, Letters(), ["0", "1"]).layers[1]
    assert layer.domain.p_value > 0.05 and layer.domain.bits < layer.domain.chance_95
    assert min(expert.q_value for expert in layer.experts) > 0.05


def test_the_estimate_is_the_derivative(planted):
    """Weights of one expert scaled by 1 - h change the loss by h times the estimate."""
    model, passages = planted
    layers = find_layers(model)
    estimate = estimate_effects(model, layers, passages)[1][:, SPECIALIST]
    step = 1e-3

    def scale(router, args, output):
        weights = output[1] * torch.where(output[2] == SPECIALIST, 1 - step, 1.0)
        return output[0], weights, output[2]

    before = score_passages(model, passages)
    hook = layers[1].router.register_forward_hook(scale)
    after = score_passages(model, passages)
    hook.remove()
    is_b = np.array([passage.domain == "b" for passage in passages])
    measured = (after - before)[is_b].sum() / (20 * is_b.sum()) / step
    assert measured == pytest.approx(estimate[1], rel=0.1)


def test_the_set_of_a_domain_has_the_specialist_and_is_needed(planted):
    model, passages = planted
    layers, routed = find_layers(model), read_routing(model, passages)
    effects = {one.domain: one for one in measure_sets(model, layers, passages, routed, size=3)}
    found = effects["b"]
    assert f"1:{SPECIALIST}" in found.experts and len(found.experts) == 3 and found.num_controls == 8
    assert f"1:{SPECIALIST}" not in effects["a"].experts
    assert found.change[1] > 1.0 and abs(found.change[0]) < 0.1 * found.change[1]
    assert found.ratio > 3 and found.ratio - 2 * found.ratio_stderr > 1
    with masked_experts(layers, ((1, SPECIALIST), (1, 0))):
        chosen = read_routing(model, passages).experts[1]
    assert not np.isin(chosen, (SPECIALIST, 0)).any()


def test_sets_are_of_equal_size_and_as_busy():
    rng = np.random.default_rng(0)
    rates = [rng.random((2, 8)) for _ in range(3)]
    chosen = preferred(rates, 0, 4, [2, 2, 2])
    lifts = {
        (place, one): rates[place][0, one] / rates[place][:, one].mean() for place in range(3) for one in range(8)
    }
    assert max(lifts, key=lifts.get) in chosen and len(chosen) == 4
    sizes = [sum(place == layer for place, _ in chosen) for layer in range(3)]
    assert max(sizes) <= 2

    def load(experts):
        return sum(rates[place][:, one].mean() for place, one in experts) / sum(table.mean(0).sum() for table in rates)

    for other in equally_busy(rates, chosen, 6, rng):
        assert not set(other) & set(chosen)
        assert [sum(place == layer for place, _ in other) for layer in range(3)] == sizes
        assert load(other) == pytest.approx(load(chosen), abs=0.05)


def test_a_set_that_cannot_be_spared_is_refused(planted):
    model, passages = planted
    with pytest.raises(ValueError, match="--set-size: got 99, expected at most 10"):
        measure_sets(model, find_layers(model), passages, read_routing(model, passages), size=99)
