"""Every MoE family of transformers: routers, experts and biases are found, counted, balanced, fused and adapted.

`dev/moe_families.py` measures a tiny model of each and makes docs/families.md of it. A default run takes five
families, the slow tests take all and compare with the page.
"""

import copy

import pytest
import torch
from moe_families import COLUMNS, NONE, PAGE, YES, RefusedError, as_markdown, survey
from tiny_families import build_tiny, find_experts_classes, loss_of, token_ids

from deepseek_training.balance import callback
from deepseek_training.balance.callback import ExpertBalanceCallback
from deepseek_training.balance.router_replay import RouterReplay
from deepseek_training.balance.routing_observer import RoutingObserver
from modeling_deepseek.families import find_moe_layers

CLASSES = dict(map(reversed, find_experts_classes()))
FIVE = ("DeepseekV3Experts", "Glm4MoeExperts", "MixtralExperts", "OlmoeExperts", "Qwen3MoeExperts")


@pytest.mark.parametrize("name", FIVE)
def test_every_column_holds(name):
    family = survey(CLASSES[name], name)
    assert not family.reasons
    assert set(family.cells.values()) <= {YES, NONE}
    assert (family.cells["bias moves"] == YES) == (family.bias != NONE) == (name in FIVE[:2])


@pytest.mark.parametrize("name", ["DeepseekV4Experts", "Ernie4_5_VLMoeMoeExperts", "ZayaExperts", "Lfm2MoeExperts"])
def test_families_with_another_layout(name):
    """Hash-routed layers without a bias, two sets of experts in one layer, biases under other names."""
    family = survey(CLASSES[name], name, ["counted", "bias moves"])
    assert family.cells == {"counted": YES, "bias moves": YES}, family.reasons


def test_a_layer_is_found_once():
    """Ernie 4.5 VL records the logits of a block that has two routers inside."""
    layers = find_moe_layers(build_tiny(CLASSES["Ernie4_5_VLMoeMoeExperts"], "Ernie4_5_VLMoeMoeExperts"))
    assert [layer.name.rpartition(".")[2] for layer in layers[:2]] == ["text_moe", "vision_moe"]
    assert all(layer.experts is not None and layer.bias is not None for layer in layers)


# What a column must notice.
FAULTS = {
    "counted": (RoutingObserver, "_begin_pass", lambda *args: None),
    "bias moves": (callback, "move_bias", lambda *args: None),
    "sequence loss": (RoutingObserver, "_with_losses", lambda *args: None),
    "z-loss": (RoutingObserver, "_with_losses", lambda *args: None),
    "replay": (RouterReplay, "_enter_router", lambda *args: None),
}


@pytest.mark.parametrize("column", FAULTS)
def test_a_column_notices_its_fault(monkeypatch, column):
    model = build_tiny(CLASSES["DeepseekV3Experts"], "DeepseekV3Experts")
    owner, method, fault = FAULTS[column]
    monkeypatch.setattr(owner, method, fault)
    with pytest.raises((RefusedError, AssertionError)):
        COLUMNS[column](lambda: copy.deepcopy(model))


@pytest.fixture(scope="module")
def families():
    return [survey(module, name) for name, module in CLASSES.items()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_is_what_is_measured(families):
    assert PAGE.read_text(encoding="utf-8") == as_markdown(families), "run dev/moe_families.py --write"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_most_families_pass_each_column(families):
    for column in ("counted", "bias moves", "sequence loss", "z-loss", "LoRA"):
        assert sum(family.cells[column] != "no" for family in families) >= 58, column
    assert sum(family.cells["fused"] == YES for family in families) >= 56
    assert sum(family.cells["quantized"] == YES for family in families) >= 58
    assert sum(family.cells["fewer experts"] == YES for family in families) >= 58
    assert sum(family.cells["replay"] == YES for family in families) >= 58
    assert sum(family.cells["bias moves"] == YES for family in families) >= 32
    assert all("\n" not in reason for family in families for reason in family.reasons.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_nothing_is_changed_in_what_is_saved(name):
    """A step of balancing with every loss leaves the names of the state dict, and all but the biases in it."""
    model = build_tiny(CLASSES[name], name).train()
    before = copy.deepcopy(model.state_dict())
    biases = {id(getattr(*layer.bias_owner)) for layer in find_moe_layers(model) if layer.bias is not None}
    balance = ExpertBalanceCallback(bias_update_speed=0.01 if biases else None, seq_aux_loss_coef=0.1)
    balance.begin(model)
    loss_of(model, token_ids()).backward()
    balance.finish_step()
    balance.end(model)
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    changed = [key for key, value in after.items() if not torch.equal(value, before[key])]
    assert all(id(after[key]) in biases for key in changed)
