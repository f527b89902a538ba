"""Fewer experts in models of other families; the witness masks the others' logits in the router and cuts nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_families import build_tiny, find_experts_classes, logits_of, token_ids
from transformers import PreTrainedModel

from deepseek_training.compress.stock_experts import plan_cut, score_experts, shrink_experts
from modeling_deepseek.families import find_moe_layers

SETTING_NAMES = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
QUICK = ("MixtralExperts", "Qwen3MoeExperts", "DeepseekV3Experts", "DeepseekV3NaiveMoe")
FAMILIES = list(find_experts_classes())


def halved(model, **more):
    """The model's configuration with half of the experts, whatever it calls them."""
    config = copy.deepcopy(model.config)
    before = find_moe_layers(model)[0].num_experts
    names = [name for name in SETTING_NAMES if getattr(config, name, None) == before]
    for name, value in {**{name: before // 2 for name in names[:1]}, **more}.items():
        setattr(config, name, value)
    return config, before


def masked_logits(model: PreTrainedModel, kept, ids):
    """The logits with the others' router logits at -inf, by the linear layers that make them."""
    weights = {}
    for layer, row in zip(find_moe_layers(model), kept, strict=True):
        weight = next(p for name, p in layer.router.named_parameters() if name.rpartition(".")[2] == "weight")
        dropped = torch.ones(weight.shape[0], dtype=torch.bool)
        dropped[row] = False
        weights[weight.data_ptr()] = dropped
        if layer.bias is not None:
            owner, name = layer.bias_owner
            getattr(owner, name).data.view(-1)[dropped] = float("-inf")
    linear = F.linear

    def masking(x, weight, bias=None):
        output = linear(x, weight, bias)
        dropped = weights.get(weight.data_ptr())
        return output if dropped is None else output.masked_fill(dropped, float("-inf"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", masking)
        return logits_of(model, ids)


@pytest.mark.parametrize(("module", "name"), [pair for pair in FAMILIES if pair[1] in QUICK])
@pytest.mark.parametrize("experts_by", ["reap", "frequency"])
def test_a_cut_family_is_the_whole_one_with_the_others_masked(module, name, experts_by):
    model, ids = build_tiny(module, name), token_ids()
    config, before = halved(model)
    student, kept = shrink_experts(model, config, ids, experts_by=experts_by, batch_size=2)
    scores = score_experts(model, find_moe_layers(model), ids, experts_by=experts_by)
    for row, score in zip(kept, scores, strict=True):
        assert len(row) == before // 2 and min(score[row]) >= max(score[i] for i in range(before) if i not in row)
    expected = masked_logits(copy.deepcopy(model), kept, ids)
    torch.testing.assert_close(logits_of(student, ids), expected, atol=1e-5, rtol=1e-4)


def test_the_same_configuration_gives_the_same_model():
    module, name = next(pair for pair in FAMILIES if pair[1] in QUICK)
    model = build_tiny(module, name)
    student, _ = shrink_experts(model, copy.deepcopy(model.config), token_ids())
    assert all(torch.equal(value, student.state_dict()[key]) for key, value in model.state_dict().items())


def test_anything_else_that_would_change_is_an_obstacle():
    module, name = next(pair for pair in FAMILIES if pair[1] == "MixtralExperts")
    model = build_tiny(module, name)
    config, before = halved(model, intermediate_size=model.config.intermediate_size // 2)
    with pytest.raises(ValueError, match=r"not a slice of the teacher: .*gate_up_proj: got "):
        shrink_experts(model, config, token_ids())
    config, _ = halved(model, num_local_experts=2 * before)
    with torch.device("meta"):
        obstacles = plan_cut(model, type(model)(config)).obstacles
    assert obstacles[0] == f"experts: got {2 * before}, expected at most the teacher's {before}"
    config, _ = halved(model, num_local_experts=1, num_experts_per_tok=2)
    with pytest.raises(ValueError, match="experts: got 1, expected at least num_experts_per_tok=2"):
        shrink_experts(model, config, token_ids())


def outcome(module, name):
    """What becomes of a family: ``cut``, or in one line why not."""
    try:
        model, ids = build_tiny(module, name), token_ids()
        config, before = halved(model)
        student, kept = shrink_experts(model, config, ids)
    except (ValueError, RuntimeError, IndexError, TypeError, AttributeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    fewer = {layer.num_experts for layer in find_moe_layers(student)}
    assert fewer == {before // 2} and all(len(row) == before // 2 for row in kept)
    assert torch.isfinite(logits_of(student, ids)).all()
    return "cut"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_most_families_lose_experts_and_the_others_say_why():
    found = {f"{module.split('.')[2]}.{name}": outcome(module, name) for module, name in FAMILIES}
    refused = {name: why for name, why in found.items() if why != "cut"}
    print(f"{len(found) - len(refused)} of {len(found)} cut", refused)
    talker = "qwen3_omni_moe.Qwen3OmniMoeTalkerTextExperts"  # takes no token ids
    assert all(why.startswith("ValueError: shrink") for name, why in refused.items() if name != talker), refused
    assert len(found) - len(refused) >= 62
