"""AWQ on whole models: an exact fold, outliers that rounding alone does not survive, the router, experts unseen."""

import copy
import dataclasses

import pytest
import torch
from tiny_families import build_tiny, find_experts_classes, logits_of, token_ids

from deepseek_training.compress import awq_fold
from deepseek_training.compress.awq import AwqSettings, awq
from deepseek_training.compress.expert_stores import DenseStore
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM
from modeling_deepseek.families import find_moe_layers
from modeling_deepseek.packed_checkpoint import check_packable_names

QUICK = ("DeepseekV3Experts", "Qwen3MoeExperts", "MixtralExperts", "OlmoeExperts", "Glm4MoeExperts")
FAMILIES = [(module, name) for module, name in find_experts_classes() if name in QUICK]
OTHERS = [(module, name) for module, name in find_experts_classes() if name not in QUICK]
NEAREST = {"grid": 0, "is_clipped": False}
OURS = {
    "rmsnorm": {},
    "layernorm": {"norm_type": "layernorm"},
    "router with keys": {"router_key_dim": 8},
    "prediction layer": {"num_nextn_predict_layers": 1, "mtp_loss_coef": 0.3},
}


def ours(seed=0, **settings):
    torch.manual_seed(seed)
    model = DeepseekForCausalLM(DeepseekConfig.from_preset("debug", vocab_size=61, **settings)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    for layer in find_moe_layers(model):  # experts that differ and matter, as trained ones do
        layer.experts.down_proj.data *= 4
    return model


IDS = torch.randint(0, 61, (16, 32), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def log_probs(model):
    return model(input_ids=IDS).logits.log_softmax(-1)


def divergence(expected, model):
    found = log_probs(model)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def poison(model, seed=0):
    """Outliers that change nothing: a channel's norm x 30 and its readers / 30, inner channels x 20 and / 20."""
    generator = torch.Generator().manual_seed(seed)
    for layer in find_moe_layers(model):
        decoder = model.get_submodule(layer.name.rpartition(".")[0])
        block, experts = layer.block, layer.experts
        width, inner = experts.down_proj.shape[1:]
        scale = torch.ones(width)
        scale[torch.randperm(width, generator=generator)[: width // 16]] = 1 / 30
        decoder.post_attention_layernorm.weight.data /= scale
        linears = (block.gate, block.shared_experts.gate_proj, block.shared_experts.up_proj)
        for weight in (*(one.weight for one in linears), experts.gate_up_proj):
            weight.data *= scale
        for expert in range(len(experts.down_proj)):
            scale = torch.ones(inner)
            scale[torch.randperm(inner, generator=generator)[: inner // 16]] = 1 / 20
            experts.down_proj.data[expert] *= scale
            experts.gate_up_proj.data[expert, inner:] /= scale[:, None]
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OURS)
def test_powers_of_two_change_no_bit_of_the_function(name, dtype):
    model = ours(**OURS[name])
    for layer in find_moe_layers(model):
        _norm(model, layer).weight.data *= (5 * torch.arange(64) % 7 - 3.0).exp2()  # or all scales would be near 1
    model = model.to(dtype)
    expected, before = log_probs(model), copy.deepcopy(model.state_dict())
    awq(model, IDS, AwqSettings(group_size=8, bits=None, is_power_of_two=True), DenseStore)
    assert torch.equal(log_probs(model), expected)
    changed = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])]
    assert any("post_attention_layernorm.weight" in key for key in changed), "there were scales to fold"
    assert any(".gate.weight" in key or ".gate.query_weight" in key for key in changed)


def test_other_scales_change_nothing_but_the_rounding_of_floats():
    model = poison(ours())
    expected = model(IDS).logits
    awq(model, IDS, AwqSettings(group_size=8, bits=None), DenseStore)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_outliers_cost_rounding_four_times_what_they_cost_awq():
    expected = log_probs(ours())
    found = {}
    for name, settings in {"nearest": NEAREST, "scales": {"is_clipped": False}, "both": {}}.items():
        model = poison(ours())
        assert abs(divergence(expected, model)) < 1e-5
        reports = awq(model, IDS, AwqSettings(group_size=16, **settings))
        found[name] = divergence(expected, model)
        assert all(report.gain < 0.5 for report in reports) == (name != "nearest")
    assert found["nearest"] > 4 * found["scales"] and found["nearest"] > 4 * found["both"], found
    clean = ours()
    awq(clean, IDS, AwqSettings(group_size=16))
    assert found["both"] < 1.3 * divergence(expected, clean), "no worse than a model without outliers"


def test_error_feedback_is_nearer_and_what_is_packed_is_what_was_found():
    expected, nearer = log_probs(ours()), {}
    for name, is_fed_back in (("to nearest", False), ("fed back", True)):
        model, dense = ours(), ours()
        awq(model, IDS, AwqSettings(group_size=16, is_fed_back=is_fed_back))
        awq(dense, IDS, AwqSettings(group_size=16, is_fed_back=is_fed_back), DenseStore)
        packed, kept = (find_moe_layers(one)[0].experts for one in (model, dense))  # before anything rounded
        for projection in ("gate_up_proj", "down_proj"):
            matrices = packed.four_bit.matrices(projection, torch.float32)
            for expert in range(8):
                torch.testing.assert_close(matrices[expert], kept.get_parameter(projection)[expert])
        nearer[name] = divergence(expected, model)
    # Little is gained on drawn weights, whose inputs hardly go together.
    assert nearer["fed back"] < 0.95 * nearer["to nearest"], nearer


def test_a_fold_without_the_router_chooses_other_experts(monkeypatch):
    """In 8 bits, where rounding costs little: what is seen is the router."""
    expected = log_probs(ours())
    nearest, awqs = poison(ours()), poison(ours())
    awq(nearest, IDS, AwqSettings(group_size=16, bits=8, **NEAREST), DenseStore)
    awq(awqs, IDS, AwqSettings(group_size=16, bits=8), DenseStore)

    def find_without_router(*args):
        fold = awq_fold.find_fold(*args)
        kept = tuple(one for one in fold.readers if one.shape[0] != 8)  # the router's rows are the 8 experts
        assert len(kept) == len(fold.readers) - 1
        return dataclasses.replace(fold, readers=kept)

    monkeypatch.setattr("deepseek_training.compress.awq.find_fold", find_without_router)
    model = poison(ours())
    awq(model, IDS, AwqSettings(group_size=16, bits=8), DenseStore)
    left_out, in_place, without = (divergence(expected, one) for one in (model, awqs, nearest))
    assert left_out > 4 * without > 4 * in_place, (left_out, without, in_place)


def test_a_router_that_the_fold_would_miss_is_refused(monkeypatch):
    find_readers = awq_fold._readers
    monkeypatch.setattr(
        awq_fold, "_readers", lambda module, width: find_readers(module, width) if "MLP" in str(type(module)) else []
    )
    with pytest.raises(ValueError, match="got a router that does not read the experts' input"):
        awq(ours(), IDS, AwqSettings(group_size=16))


@torch.no_grad()
def test_an_expert_that_no_token_comes_to_is_calibrated_all_the_same():
    model = ours()
    for layer in find_moe_layers(model):
        layer.bias[0] = -1e4
    before = copy.deepcopy(model)
    reports = awq(model, IDS, AwqSettings(group_size=16))
    assert [report.experts_unseen for report in reports] == [1, 1] and reports[0].experts_below >= 1
    hidden = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    for old, new in zip(find_moe_layers(before), find_moe_layers(model), strict=True):
        scale = _norm(model, new).weight / _norm(before, old).weight
        assert all(buffer.isfinite().all() for buffer in new.experts.four_bit.buffers())
        errors = []
        for expert in range(8):
            chosen, ones = torch.full((64, 1), expert), torch.ones(64, 1)
            wanted = type(old.experts).forward(old.experts, hidden, chosen, ones)
            errors.append(float((new.experts(hidden * scale, chosen, ones) - wanted).norm() / wanted.norm()))
        assert errors[0] < 1.3 * sum(errors) / 8, errors


def _norm(model, layer):
    return model.get_submodule(layer.name.rpartition(".")[0]).post_attention_layernorm


def test_one_token_is_enough_to_run():
    model = ours()
    reports = awq(model, IDS[:1, :1], AwqSettings(group_size=16))
    assert all(report.num_tokens == 1 and report.experts_below == 8 for report in reports)
    assert log_probs(model).isfinite().all()


def test_a_prediction_layer_is_rounded_and_said_to_be_uncalibrated():
    model = ours(**OURS["prediction layer"])
    reports = awq(model, IDS, AwqSettings(group_size=16))
    assert [report.num_tokens for report in reports] == [512, 512, 0]
    assert all("four_bit" in layer.experts._modules for layer in find_moe_layers(model))


@pytest.mark.parametrize(("module", "name"), FAMILIES, ids=[name for _, name in FAMILIES])
def test_the_fold_of_other_families_changes_no_bit(module, name):
    model = build_tiny(module, name).eval()
    _check_family(model)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name"), OTHERS, ids=[name for _, name in OTHERS])
def test_every_other_family_is_folded_without_a_change_or_refused_in_one_line(module, name):
    model = build_tiny(module, name).eval()
    try:
        _check_family(model)
    except ValueError as error:
        assert str(error).startswith(("model: ", "experts: ", "experts_implementation: ")) and "\n" not in str(error)


@torch.no_grad()
def _check_family(model):
    check_packable_names(model)
    expected = logits_of(model, token_ids())
    awq(model, token_ids(16), AwqSettings(group_size=8, bits=None, is_power_of_two=True), DenseStore)
    assert torch.equal(logits_of(model, token_ids()), expected)
    awq(model, token_ids(16), AwqSettings(group_size=8))
    assert logits_of(model, token_ids()).isfinite().all()
