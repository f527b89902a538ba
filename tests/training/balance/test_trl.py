"""The balancing callback and the auxiliary losses inside TRL's stock trainers."""

import pytest
import torch
from datasets import Dataset
from moe_routers import find_routers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from deepseek_training.balance.callback import ExpertBalanceCallback
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM, DeepseekForSequenceClassification, modeling_deepseek

pytestmark = pytest.mark.slow

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "the", "cat", "dog", "sat", "ran", "on", "under", "a", "mat", "tree", "and"]
WORDS += ["then", "slept", "well", "far", "away"]


@pytest.fixture
def tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return tokenizer


def build(model_class=DeepseekForCausalLM, **settings):
    torch.manual_seed(0)
    config = DeepseekConfig.from_preset(
        "debug",
        vocab_size=len(WORDS),
        **{"router_bias_update_speed": 0.01, "seq_aux_loss_coef": 0.5, "router_z_loss_coef": 0.2, **settings},
    )
    config.num_labels = 1
    return model_class(config)


OPTIONS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "bf16": False,
}


ONE_SGD_STEP = {**OPTIONS, "max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}


def assert_balanced(model, callback):
    for router in find_routers(model):
        assert router.e_score_correction_bias.abs().max() > 0.005
        assert router.e_score_correction_bias.mean().abs() < 1e-6
    assert callback.history and callback.history[-1].figures["load_imbalance"] >= 1


def assert_auxiliary_gradient(train):
    """One step of SGD, with our losses and without, on the same draws: the routers' weights tell them apart."""
    weights = []
    for settings in ({}, {"seq_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}):
        callback = ExpertBalanceCallback()
        model = train(callback, **settings)
        assert_balanced(model, callback)
        weights.append([router.weight.detach().clone() for router in find_routers(model)])
    for one, other in zip(*weights, strict=True):
        assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("loss_type", ["chunked_nll", "nll"])
def test_sft(tmp_path, tokenizer, loss_type):
    """TRL computes the loss itself; its own pooled balance loss is switched off."""
    from trl import SFTConfig, SFTTrainer

    dataset = Dataset.from_dict({"text": ["the cat sat on a mat", "a dog ran under the tree and slept"] * 4})
    arguments = SFTConfig(str(tmp_path), loss_type=loss_type, router_aux_loss_coef=0.0, **ONE_SGD_STEP)

    def train(callback, **settings):
        model = build(**settings)
        SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=[callback]).train()
        return model

    assert_auxiliary_gradient(train)


def test_sft_with_its_defaults(tmp_path, tokenizer):
    """Stock DeepSeek-V3 crashes here: no `num_experts`, no `aux_loss`."""
    from trl import SFTConfig, SFTTrainer

    dataset = Dataset.from_dict({"text": ["the cat sat on a mat", "a dog ran under the tree and slept"] * 4})
    callback, model = ExpertBalanceCallback(), build()
    SFTTrainer(
        model,
        SFTConfig(str(tmp_path), **OPTIONS),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[callback],
    ).train()
    assert_balanced(model, callback)


def test_dpo(tmp_path, tokenizer):
    from trl import DPOConfig, DPOTrainer

    dataset = Dataset.from_dict(
        {"prompt": ["the cat", "a dog"] * 4, "chosen": ["sat on a mat"] * 8, "rejected": ["ran away"] * 8}
    )

    def train(callback, **settings):
        build(**settings).save_pretrained(tmp_path / "model")  # TRL loads the reference from where the policy is from.
        model = DeepseekForCausalLM.from_pretrained(tmp_path / "model", router_bias_update_speed=0.01)
        arguments = DPOConfig(str(tmp_path), **ONE_SGD_STEP)
        DPOTrainer(
            model, None, arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=[callback]
        ).train()
        return model

    assert_auxiliary_gradient(train)


def test_grpo(tmp_path, tokenizer):
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions, **kwargs):
        return [float(len(set(text.split()))) for text in completions]

    dataset = Dataset.from_dict({"prompt": ["the cat", "a dog"] * 4})
    arguments = GRPOConfig(str(tmp_path), num_generations=2, max_completion_length=6, **ONE_SGD_STEP)

    def train(callback, **settings):
        model = build(**settings)
        GRPOTrainer(
            model, reward, arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=[callback]
        ).train()
        return model

    assert_auxiliary_gradient(train)


def test_ppo(tmp_path, tokenizer):
    ppo = pytest.importorskip("trl.experimental.ppo", reason="this TRL has no PPO of its own")
    dataset = Dataset.from_dict({"input_ids": [[4, 5], [14, 6]] * 4})
    options = {key: value for key, value in ONE_SGD_STEP.items() if key != "max_steps"}
    arguments = ppo.PPOConfig(
        str(tmp_path), total_episodes=4, response_length=5, num_ppo_epochs=1, num_sample_generations=0,
        missing_eos_penalty=1.0, **options,
    )  # fmt: skip

    def train(callback, **settings):
        critic, reward = build(DeepseekForSequenceClassification), build(DeepseekForSequenceClassification)
        policy = build(**settings)
        ppo.PPOTrainer(
            args=arguments, processing_class=tokenizer, model=policy, ref_model=None, reward_model=reward,
            value_model=critic, train_dataset=dataset, eval_dataset=dataset, callbacks=[callback],
        ).train()  # fmt: skip
        assert not any(router.e_score_correction_bias.any() for router in find_routers(reward)), "only scored with"
        return policy

    assert_auxiliary_gradient(train)


@pytest.mark.parametrize("trainer", ["sft nll", "sft chunked_nll", "dpo", "grpo"])
def test_their_own_coefficient_gives_a_gradient(tmp_path, tokenizer, trainer):
    """`router_aux_loss_coef` of TRL, on by default, raises the loss; it must move the routers too."""
    gradients = []
    for coefficient in (0.0, 1.0):
        build(router_bias_update_speed=0.0, seq_aux_loss_coef=0.0, router_z_loss_coef=0.0).save_pretrained(
            tmp_path / "m"
        )
        model = DeepseekForCausalLM.from_pretrained(tmp_path / "m")
        watch = Watch()
        make_trl_trainer(trainer, tmp_path, tokenizer, model, watch, router_aux_loss_coef=coefficient).train()
        gradients.append(watch.gradients)
    off, on = gradients
    assert max((on[name] - off[name]).abs().max() for name in off) > 1e-4


class Watch(TrainerCallback):
    """Keeps the routers' gradients before the optimizer's step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if n.endswith("mlp.gate.weight")}


def make_trl_trainer(name, folder, tokenizer, model, callback, **settings):
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    common = {"processing_class": tokenizer, "callbacks": [callback]}
    options = {**ONE_SGD_STEP, **settings}
    if name.startswith("sft"):
        rows = Dataset.from_dict({"text": ["the cat sat on a mat", "a dog ran under the tree and slept"] * 4})
        return SFTTrainer(
            model, SFTConfig(str(folder), loss_type=name.split()[1], **options), train_dataset=rows, **common
        )
    if name == "dpo":
        rows = {"prompt": ["the cat", "a dog"] * 4, "chosen": ["sat on a mat"] * 8, "rejected": ["ran away"] * 8}
        return DPOTrainer(
            model, None, DPOConfig(str(folder), **options), train_dataset=Dataset.from_dict(rows), **common
        )
    rows = Dataset.from_dict({"prompt": ["the cat", "a dog"] * 4})
    config = GRPOConfig(str(folder), num_generations=2, max_completion_length=6, **options)
    return GRPOTrainer(
        model, lambda completions, **_: [float(len(c)) for c in completions], config, train_dataset=rows, **common
    )


def test_their_coefficient_without_a_gradient_is_said(tmp_path, tokenizer, caplog):
    """Reentrant checkpointing records router logits that have none."""
    type(modeling_deepseek.logger).warning_once.cache_clear()
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    make_trl_trainer("sft nll", tmp_path, tokenizer, build(), Watch(), router_aux_loss_coef=1.0, **options).train()
    assert sum("aux_loss: it has no gradient" in record.getMessage() for record in caplog.records) == 1


def test_without_the_callback_each_says_so_once(tmp_path, tokenizer, caplog):
    from trl import SFTConfig, SFTTrainer

    type(modeling_deepseek.logger).warning_once.cache_clear()  # another test may have made it speak already
    dataset = Dataset.from_dict({"text": ["the cat sat on a mat", "a dog ran under the tree and slept"] * 4})
    model = build()
    arguments = SFTConfig(str(tmp_path), gradient_accumulation_steps=2, **OPTIONS)
    SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer).train()
    messages = [record.getMessage() for record in caplog.records]
    assert sum("without ExpertBalanceCallback; pass one to the trainer" in message for message in messages) == 2
    assert not any(router.e_score_correction_bias.any() for router in find_routers(model))
