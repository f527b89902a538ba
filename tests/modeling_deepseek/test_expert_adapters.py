"""PEFT's adapters of experts through `fused_moe`: PEFT's own results, and nothing of a weight's size built."""

import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_fused_experts import BASE, FAMILIES
from transformers import AutoModelForCausalLM, GptOssConfig

from deepseek_records.activation_checkpointing import enable_checkpointing

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.randint(0, 61, (2, 19), generator=torch.Generator().manual_seed(3))


def build(name="qwen3_moe", **settings):
    config_class, sizes = FAMILIES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**{**BASE, **sizes}), experts_implementation="fused_moe")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(**settings)


def adapt(model, **settings):
    config = {"r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": EXPERTS, **settings}
    return randomize(get_peft_model(model, LoraConfig(**config)))


def randomize(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return model


def run(model, implementation):
    model.base_model.model.set_experts_implementation(implementation)
    model.zero_grad()
    output = model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    return output.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def never_folds(monkeypatch):
    """Fails as soon as PEFT puts anything in the place of a weight."""

    def refuse(*args, **kwargs):
        raise AssertionError("a merged copy of the experts was built")

    monkeypatch.setattr(torch.nn.utils.parametrize, "register_parametrization", refuse)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_equal_pefts_fold(name, monkeypatch):
    model = adapt(build(name))
    expected, gradients = run(model, "eager")
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils.parametrize, "register_parametrization", None)
        found, own_gradients = run(model, "fused_moe")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == own_gradients.keys() and all("lora_" in key for key in gradients)
    for key, gradient in gradients.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(own_gradients[key], gradient, rtol=1e-4, atol=1e-5, msg=key)


def test_biased_interleaved_transposed_experts(monkeypatch):
    """GPT-OSS: rows of B are in the order in which the weights are stored, gate and up in turn."""
    torch.manual_seed(0)
    settings = {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(GptOssConfig(**{**BASE, **settings}), attn_implementation="eager")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model = adapt(model)
    expected, gradients = run(model, "eager")
    monkeypatch.setattr(torch.nn.utils.parametrize, "register_parametrization", None)
    found, own_gradients = run(model, "fused_moe")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for key, gradient in gradients.items():
        torch.testing.assert_close(own_gradients[key], gradient, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.usefixtures("never_folds")
@pytest.mark.parametrize("target", EXPERTS)
def test_one_projection_alone(target):
    assert run(adapt(build(), target_parameters=[target]), "fused_moe")[1]


@pytest.mark.usefixtures("never_folds")
def test_bf16_experts_with_an_fp32_adapter():
    model = adapt(build(dtype=torch.bfloat16))
    assert all(gradient.dtype == torch.float32 for gradient in run(model, "fused_moe")[1].values())


def test_several_active_adapters_of_different_ranks():
    model = adapt(build())
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=EXPERTS))
    randomize(model, seed=2).base_model.set_adapter(["default", "second"])
    expected, gradients = run(model, "eager")
    found, own_gradients = run(model, "fused_moe")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert {key.split(".")[-2] for key in own_gradients} == {"default", "second"}
    for key, gradient in gradients.items():
        torch.testing.assert_close(own_gradients[key], gradient, rtol=1e-4, atol=1e-5, msg=key)
    only_one = logits(model.set_adapter("second") or model)
    assert (only_one - found).norm() > 0.01 * found.norm()


@pytest.mark.usefixtures("never_folds")
def test_disabled_merged_saved_loaded_and_unloaded(tmp_path):
    before = logits(build())
    model = adapt(build())
    adapted = logits(model)
    assert (adapted - before).norm() > 0.05 * before.norm()
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(logits(again), adapted)
    assert torch.equal(logits(adapt(build()).unload()), before)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(again.merge_and_unload()), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("never_folds")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation(use_reentrant):
    model = adapt(build())
    expected = run(model, "fused_moe")
    model.enable_input_require_grads()
    enable_checkpointing(model, {"use_reentrant": use_reentrant})
    found = run(model.train(), "fused_moe")
    for key, gradient in expected[1].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-5, atol=1e-6)


def test_experts_that_train_too_are_folded_with_one_warning(caplog):
    """Their gradient is as large as the fold; PEFT's way costs nothing more."""
    model = adapt(build())
    for name, parameter in model.named_parameters():
        if name.endswith(".down_proj") and parameter.dim() == 3:
            parameter.requires_grad_()
    expected = run(model, "eager")
    with caplog.at_level(logging.WARNING):
        found = run(model, "fused_moe")
    assert any(name.endswith(".down_proj") for name in found[1]) and expected[1].keys() == found[1].keys()
    for key, gradient in expected[1].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-4, atol=1e-5, msg=key)
    told = [record.getMessage() for record in caplog.records if "added to a copy of its weights" in record.message]
    assert len(told) == 1 and "the experts' own weights train as well" in told[0]


def test_other_implementations_keep_pefts_way():
    model = adapt(build())
    expected = run(model, "eager")
    found = run(model, "grouped_mm")
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
