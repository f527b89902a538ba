"""Router drift of an update: zero where nothing moved, calibrated against chance, found where it is real."""

import numpy as np
import torch

from deepseek_cli.router_drift import compare_loads, measure_router_drift
from deepseek_training.continual.held_out_units import HeldOutUnits
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM
from modeling_deepseek.families import find_moe_layers


def loads(draws, shares, documents=40, tokens=60):
    """Documents with tastes of their own around common shares."""
    tastes = draws.dirichlet(np.asarray(shares) * 40, documents)
    return np.stack([draws.multinomial(tokens, taste) for taste in tastes])


def test_equal_loads_have_not_moved():
    counts = loads(np.random.default_rng(0), [0.5, 0.3, 0.2])
    raw, corrected, p = compare_loads(counts, counts)
    assert raw == corrected == 0 and p == 1


def test_chance_is_not_drift_and_drift_is():
    draws = np.random.default_rng(0)
    values = [compare_loads(loads(draws, [0.4, 0.3, 0.2, 0.1]), loads(draws, [0.4, 0.3, 0.2, 0.1])) for _ in range(60)]
    p = np.array([one[2] for one in values])
    assert 0.3 < p.mean() < 0.7 and (p < 0.05).mean() < 0.15
    assert abs(np.mean([one[1] for one in values])) < 0.2 * np.mean([one[0] for one in values])
    raw, corrected, p = compare_loads(loads(draws, [0.4, 0.3, 0.2, 0.1]), loads(draws, [0.1, 0.2, 0.3, 0.4]))
    assert corrected > 0.3 and p < 0.001 and raw > corrected


def test_rows_are_by_set_and_layer():
    torch.manual_seed(0)
    config = DeepseekConfig.from_preset("debug", vocab_size=61)
    old, new = DeepseekForCausalLM(config), DeepseekForCausalLM(config)
    new.load_state_dict(old.state_dict())
    layers = [layer.name for layer in find_moe_layers(old)]
    with torch.no_grad():
        find_moe_layers(new)[0].router.e_score_correction_bias[:3] += 10
    draws = np.random.default_rng(0)
    documents = [draws.integers(3, 61, 30).astype(np.int32) for _ in range(12)]
    ones = np.ones(12)
    units = HeldOutUnits("texts", "document", [""] * 12, documents, ones, ones > 0)
    rows = measure_router_drift(old, new, [units])
    assert [(row["dataset"], row["layer"]) for row in rows] == [("texts", name) for name in layers]
    assert rows[0]["corrected"] > 0.3 and rows[0]["p"] < 0.01
