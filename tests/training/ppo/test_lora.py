"""PPO on LoRA policies: reference and value model share the policy's frozen weights, and nothing else."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from ppo_parts import losses, make_models, make_ours, make_prompts, mended
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from deepseek_training.ppo.checkpoint import last_checkpoint
from deepseek_training.ppo.value import LoraValueModel, shared_value_model, without_adapter
from deepseek_training.trainer.lora import merged
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

SETTINGS = dict(total_episodes=16, save_strategy="steps", save_steps=2, logging_steps=1)


def lora():
    return LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1)


def make_lora(folder, *, models=None, make=make_ours, **settings):
    models = models or (make_models()[0], None)
    return make(folder, models=models, **{"peft_config": lora(), **SETTINGS, **settings})


def unique_bytes(*models):
    tensors = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    return sum(tensors.values())


def own_bytes(model):
    """Adapters and head: what LoRA adds."""
    added = [p for name, p in model.named_parameters() if "lora_" in name or "score" in name]
    return sum(p.numel() * p.element_size() for p in added)


@mended(AssertionError)
def test_the_weights_exist_once(make, tmp_path):
    policy, value = make_models()
    base = unique_bytes(policy)
    trainer = make_lora(tmp_path, models=(policy, None if make is make_ours else value), make=make)
    trainer.train()
    models = [m for m in (trainer.policy_model, trainer.value_model, trainer.ref_model) if m is not None]
    assert unique_bytes(*models) <= base + own_bytes(trainer.policy_model) + own_bytes(trainer.value_model)


def test_the_optimizer_sees_adapters_and_head_only(tmp_path):
    trainer = make_lora(tmp_path)
    base = {name: p.clone() for name, p in trainer.policy_model.named_parameters() if "lora_" not in name}
    trainer.train()
    in_optimizer = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    heads = sum(p.numel() for name, p in trainer.value_model.named_parameters() if "score.original" in name)
    assert in_optimizer * 4 == own_bytes(trainer.policy_model) + own_bytes(trainer.value_model) - 4 * heads
    for name, weight in base.items():
        assert torch.equal(dict(trainer.policy_model.named_parameters())[name], weight)
    for model in (trainer.policy_model, trainer.value_model):
        assert any(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    assert losses(trainer)[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)  # the reference: the adapter turned off
    assert losses(trainer)[-1]["objective/kl"] != 0.0


def test_neither_adapter_gets_the_others_gradient(tmp_path):
    trainer = make_lora(tmp_path, gradient_checkpointing=True)
    trainer.model.train()
    trainer.value_model.score.modules_to_save["default"].weight.data.normal_()
    ids = torch.randint(3, 20, (2, 9))
    logits, values, _ = trainer.model(ids, 4)
    for loss, learning, other in (
        (logits.square().sum(), trainer.policy_model, trainer.value_model),
        (values.square().sum(), trainer.value_model, trainer.policy_model),
    ):
        trainer.model.zero_grad()
        loss.backward()
        touched = [name for name, p in other.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
        assert touched == []
        adapters = [p for name, p in learning.named_parameters() if "lora_B" in name]
        assert adapters and all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters)


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_shared_and_separate_weights_trace_the_same_losses(checkpointing, tmp_path):
    settings = dict(gradient_checkpointing=checkpointing is not None, gradient_checkpointing_kwargs=checkpointing)
    runs = []
    for name in ("shared", "separate"):
        policy, _ = make_models()
        torch.manual_seed(1)
        value = shared_value_model(policy if name == "shared" else copy.deepcopy(policy), lora())
        torch.manual_seed(2)  # peft draws the policy's adapter
        trainer = make_lora(tmp_path / name, models=(policy, value), **settings)
        trainer.train()
        runs.append(trainer)
    shared, separate = runs
    assert unique_bytes(shared.model) < unique_bytes(separate.model)
    for mine, theirs in zip(losses(shared), losses(separate), strict=True):
        for name in ("loss/policy_avg", "loss/value_avg", "objective/kl", "grad_norm"):
            assert mine[name] == theirs[name], name
    mine, theirs = shared.model.state_dict(), separate.model.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@mended(TypeError)
def test_resumes_exactly(make, tmp_path):
    value = None if make is make_ours else make_models()[1]

    def fresh(folder):
        torch.manual_seed(3)
        return make_lora(folder, make=make, models=(make_models()[0], value))

    whole = fresh(tmp_path / "whole")
    whole.train()
    cut = fresh(tmp_path / "cut")
    cut.args.num_total_batches = 2
    cut.train()
    torch.manual_seed(99)  # other adapters, overwritten by the checkpoint's
    resumed = make_lora(tmp_path / "cut", make=make, models=(make_models()[0], value))
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path / "cut"))
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_what_is_saved_loads_again(tmp_path):
    trainer = make_lora(tmp_path)
    trainer.train()
    ids = torch.randint(3, 20, (2, 9))
    folder = tmp_path / "checkpoint-4"
    with torch.no_grad():
        trainer.model.eval()
        logits = trainer.policy_model(ids).logits
        values = trainer.value_model.score(trainer.value_model.decoder(ids).last_hidden_state)
        again = PeftModel.from_pretrained(make_models()[0], folder)
        torch.testing.assert_close(again(ids).logits, logits)
        classifier = LlamaForSequenceClassification(trainer.value_model.config)
        classifier.model.load_state_dict(make_models()[0].model.state_dict())
        again = PeftModel.from_pretrained(classifier, folder / "value_model")
        torch.testing.assert_close(again.base_model.model.score(again.base_model.model.model(ids)[0]), values)
        for model, name in ((merged(trainer.policy_model), "model"), (merged(trainer.value_model), "value")):
            model.save_pretrained(tmp_path / name)
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "model").eval()
        torch.testing.assert_close(loaded(ids).logits, logits)
        loaded = LlamaForSequenceClassification.from_pretrained(tmp_path / "value").eval()
        torch.testing.assert_close(loaded.score(loaded.model(ids)[0]), values)
        reference = without_adapter(trainer.policy_model)
        torch.testing.assert_close(reference(ids).logits, make_models()[0](ids).logits)


def test_a_policy_that_is_lora_already(tmp_path):
    policy = get_peft_model(make_models()[0], lora())
    trainer = make_lora(tmp_path, models=(policy, None), peft_config=None)
    assert isinstance(trainer.value_model, LoraValueModel)
    assert unique_bytes(trainer.model) <= unique_bytes(make_models()[0]) + own_bytes(policy) + own_bytes(
        trainer.value_model
    )
    trainer.train()
    assert all(abs(row["loss/value_avg"]) < 100 for row in losses(trainer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_own_model_with_its_experts_adapted(dtype, tmp_path):
    # MTP layers predict tokens, which a value model does not; experts are one 3-D parameter each
    config = DeepseekConfig.from_preset("debug", vocab_size=29, num_nextn_predict_layers=1, mtp_loss_coef=0.1)
    torch.manual_seed(0)
    policy = DeepseekForCausalLM(config).to(dtype)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    trainer = make_lora(
        tmp_path,
        models=(policy, None),
        peft_config=LoraConfig(r=2, target_modules=["o_proj"], target_parameters=experts),
        bf16=dtype == torch.bfloat16,
        total_episodes=8,
    )
    trainer.train()
    names = {name for name, p in trainer.value_model.named_parameters() if "lora_B" in name and p.abs().sum() > 0}
    assert any("experts" in name for name in names)
    assert unique_bytes(trainer.policy_model, trainer.value_model) <= unique_bytes(policy) + own_bytes(
        trainer.policy_model
    ) + own_bytes(trainer.value_model)


def test_a_full_policy_needs_a_value_model(tmp_path):
    with pytest.raises(ValueError, match="value_model=None: only a LoRA policy") as caught:
        make_ours(tmp_path, models=(make_models()[0], None))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_learns(tmp_path):
    trainer = make_lora(
        tmp_path,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        train=make_prompts(64),
        held_out=make_prompts(64, seed=3),
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        total_episodes=32 * 25,
        num_mini_batches=2,
        kl_coef=0.01,
        learning_rate=3e-2,
        save_strategy="no",
    )
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_reward"] > before + 5 * after["eval_reward_stderr"]
    assert after["eval_kl"] > 0
