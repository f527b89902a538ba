import json
import os
import re
import socket
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from moe_routers import find_routers
from packaging.version import Version
from transformers import (
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from deepseek_training.balance.callback import ExpertBalanceCallback
from deepseek_training.balance.replay_callback import RouterReplayCallback
from deepseek_training.balance.training_figures import TrainingFigures
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM, modeling_deepseek
from modeling_deepseek.auxiliary_loss import router_z_loss, sequence_balance_loss
from modeling_deepseek.families import find_moe_layers
from modeling_deepseek.token_layout import TokenLayout, make_layout

TINY = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 64,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Weights a hundred times the usual, so that a lost or doubled auxiliary gradient cannot hide behind the main one.
BALANCED = {
    "router_bias_update_speed": 0.01,
    "seq_aux_loss_coef": 0.5,
    "router_z_loss_coef": 0.2,
    "min_experts_per_tok": 1,
    "target_experts_per_tok": 1.7,
}


def build(**settings):
    torch.manual_seed(0)
    model = DeepseekForCausalLM(DeepseekConfig(**{**TINY, **settings}))
    for router in find_routers(model):
        torch.nn.init.normal_(router.weight, std=0.3)
    return model


def batch(rows=8, length=15, seed=0):
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


# Formulas ------------------------------------------------------------------------------------------------------------


def test_balance_loss_is_the_papers_formula_sequence_by_sequence():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(10, 4, generator=generator)
    indices = torch.rand(10, 4, generator=generator).topk(2).indices
    ids = torch.tensor([0, 0, 0, -1, 1, 1, 1, 1, 3, -1])  # Three sequences; id 2 is empty.
    losses = []
    for members in ([0, 1, 2], [4, 5, 6, 7], [8]):
        loss = 0.0
        for expert in range(4):
            count = sum(expert in indices[t].tolist() for t in members)
            share = sum((scores[t, expert] / scores[t].sum()).item() for t in members) / len(members)
            loss += 4 / (2 * len(members)) * count * share
        losses.append(loss)
    found = sequence_balance_loss(scores, indices, None, TokenLayout(ids, 4))
    assert found.item() == pytest.approx(sum(losses) / 3, rel=1e-5)
    even = sequence_balance_loss(
        torch.ones(4, 4), torch.arange(4).view(4, 1), None, TokenLayout(torch.zeros(4).long(), 1)
    )
    assert even.item() == pytest.approx(1.0)


def test_z_loss_is_the_papers_formula():
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [9.0, 9.0, 9.0]])
    layout = TokenLayout(torch.tensor([0, 0, -1]), 1)
    expected = (torch.log(torch.tensor([1.0, 2.0, 3.0]).exp().sum()) ** 2 + torch.log(torch.tensor(3.0)) ** 2) / 2
    assert router_z_loss(logits, layout).item() == pytest.approx(expected.item())


def test_layouts_of_padded_and_packed_batches_name_the_same_sequences():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    assert make_layout(mask.shape, mask.device, mask, None).sequence_ids.tolist() == [0, 0, 0, -1, -1, 1, 1, 1]
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    packed = make_layout(positions.shape, positions.device, None, positions)
    padded = torch.tensor([[0] * 5 + [1] * 3] * 4)  # padding is no sequence, whatever its positions
    layout = make_layout(padded.shape, padded.device, padded, padded.cumsum(1) - padded)
    assert layout.num_sequences == 4 and layout.sequence_ids.view(4, 8)[:, 5:].tolist() == [[i] * 3 for i in range(4)]
    assert packed == (packed.sequence_ids, 3) and packed.sequence_ids.tolist() == [0, 0, 0, 1, 1, 2]
    whole = make_layout(torch.Size((2, 3)), mask.device, None, torch.arange(3).unsqueeze(0))
    assert whole.sequence_ids.tolist() == [0, 0, 0, 1, 1, 1]


def test_bias_moves_by_the_sign_rule_and_stays_centered():
    router = find_routers(build(router_bias_update_speed=0.01))[0].to(torch.bfloat16)
    router.e_score_correction_bias.fill_(0.5)
    router.finish_step(torch.tensor([10, 2, 2, 2, 2, 2, 2, 2]), 8)
    # One expert above the mean of 3, seven below: +0.01 for those, -0.01 for it, less the mean of 0.0075.
    expected = 0.5 + torch.tensor([-0.0175, *[0.0025] * 7])
    torch.testing.assert_close(router.e_score_correction_bias, expected)
    assert router.e_score_correction_bias.dtype == torch.float32


# Invariances ---------------------------------------------------------------------------------------------------------


def auxiliary_gradients(model, **inputs):
    """Router gradients of the auxiliary losses alone: those of a step whose main loss is multiplied by zero."""
    model.train().zero_grad()
    (model(**inputs).logits.sum() * 0).backward()
    return [router.weight.grad.clone() for router in find_routers(model)]


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="5.17's output has no router_logits")
def test_losses_reach_the_gradient_whoever_computes_the_main_one():
    """Witness: autograd through the formulas outside the model."""
    settings = {"seq_aux_loss_coef": 0.5, "router_z_loss_coef": 0.2}
    found = auxiliary_gradients(build(**settings), input_ids=batch())
    model = build()
    output = model.train()(batch(), output_router_logits=True)
    loss = 0
    for router, logits in zip(find_routers(model), output.router_logits, strict=True):
        layout = make_layout(batch().shape, logits.device, None, None)
        loss = loss + 0.5 * router.balance_loss(logits, layout) + 0.2 * router_z_loss(logits, layout)
    model.zero_grad()
    loss.backward()
    for one, router in zip(found, find_routers(model), strict=True):
        torch.testing.assert_close(one, router.weight.grad, rtol=1e-4, atol=1e-7)
        assert one.abs().max() > 1e-3


def run_trainer(folder, **options):
    """Steps of plain SGD through the stock Trainer on the same 8 rows each; the model it leaves."""
    trainer = make_trainer(folder, **options)
    trainer.train()
    return trainer.model, trainer


def make_trainer(folder, *, num_steps=3, callbacks=None, model=None, rows=None, **arguments):
    model = build(**BALANCED) if model is None else model
    rows = [{"input_ids": row, "labels": row} for row in batch()] if rows is None else rows
    options = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "optim": "sgd",
        "save_strategy": "no",
    }
    options |= arguments
    return Trainer(
        model,
        TrainingArguments(
            folder, max_steps=num_steps, learning_rate=0.5, lr_scheduler_type="constant", use_cpu=True,
            report_to=[], disable_tqdm=True, logging_steps=1, max_grad_norm=0.0, **options,
        ),
        train_dataset=rows,
        callbacks=[ExpertBalanceCallback()] if callbacks is None else callbacks,
    )  # fmt: skip


def assert_same_training(one, other, tolerance=2e-5):
    expected = one.state_dict()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(
            value, expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n} {m}"
        )


RANK = """
import sys, torch
sys.path[:0] = {path!r}
from test_callback import ExpertBalanceCallback, run_trainer
model, trainer = run_trainer({folder!r}, per_device_train_batch_size=4, ddp_backend="gloo")
assert trainer.accelerator.num_processes == 2, trainer.accelerator.state
if trainer.accelerator.is_main_process:
    torch.save(model.state_dict(), {folder!r} + "/state.pt")
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ExpertBalanceCallback))
    torch.save(callback.tokens_per_expert, {folder!r} + "/load.pt")
"""


@pytest.mark.slow
def test_one_batch_equals_two_processes(tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    code = RANK.format(
        path=[os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))], folder=str(tmp_path)
    )
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    callback = ExpertBalanceCallback()
    whole, _ = run_trainer(tmp_path, callbacks=[callback])
    other = build(**BALANCED)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert_same_training(whole, other)
    assert all(map(torch.equal, torch.load(tmp_path / "load.pt"), callback.tokens_per_expert))


# Without the callback ------------------------------------------------------------------------------------------------


def test_without_the_callback_bias_and_share_keep_still_and_each_is_said_once(tmp_path, caplog):
    type(modeling_deepseek.logger).warning_once.cache_clear()  # another test may have made it speak already
    model, _ = run_trainer(tmp_path, callbacks=[], num_steps=4, per_device_train_batch_size=2)
    messages = [record.getMessage() for record in caplog.records]
    for setting in (
        "router_bias_update_speed=0.01: the balancing bias",
        "target_experts_per_tok=1.7: the expert share",
    ):
        assert sum(setting in message and "pass one to the trainer" in message for message in messages) == 1
    for router, fresh in zip(find_routers(model), find_routers(build(**BALANCED)), strict=True):
        assert not router.e_score_correction_bias.any()
        assert torch.equal(router.share.state, fresh.share.state)


def test_evaluation_and_generation_are_not_counted():
    model = build(**BALANCED)
    callback = ExpertBalanceCallback()
    callback.begin(model)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.generate(batch(2), max_new_tokens=3, do_sample=False)
    model(batch()).logits.sum().backward()
    with torch.no_grad():
        model.train()(batch())
    callback.finish_step()
    assert not any(router.e_score_correction_bias.any() for router in find_routers(model))
    model(batch())
    callback.finish_step()
    assert all(router.e_score_correction_bias.any() for router in find_routers(model))
    callback.end(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()), "nothing is left"


# Which trainer, which place ------------------------------------------------------------------------------------------


class Tracker(TrainerCallback):
    """Stands where trackers stand: `Trainer` puts those before a user's callbacks."""

    def __init__(self):
        self.keys = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.keys |= logs.keys()


def test_attached_it_comes_before_the_trackers(tmp_path):
    tracker = Tracker()
    trainer = make_trainer(tmp_path, callbacks=[tracker])
    callback = ExpertBalanceCallback.attach(trainer)
    trainer.train()
    assert "load_imbalance" in tracker.keys and trainer.callback_handler.callbacks[0] is callback


@pytest.mark.parametrize("kind", [ExpertBalanceCallback, TrainingFigures, RouterReplayCallback])
def test_attach_is_refused_on_an_instance_whose_settings_it_would_drop(kind):
    with pytest.raises(TypeError, match=rf"{kind.__name__}.attach: got an instance, expected {kind.__name__}.attach"):
        kind().attach(None)


def test_in_the_list_it_comes_behind_them_and_says_so(tmp_path, caplog):
    type(modeling_deepseek.logger).warning_once.cache_clear()
    tracker, callback = Tracker(), ExpertBalanceCallback()
    trainer = make_trainer(tmp_path, callbacks=[tracker, callback])
    trainer.args.report_to = ["tensorboard"]
    trainer.train()
    assert "load_imbalance" not in tracker.keys
    assert "load_imbalance" in trainer.state.log_history[0] and callback.history[0].figures["load_imbalance"] >= 1
    assert sum("the trackers tensorboard come before it" in record.getMessage() for record in caplog.records) == 1


class Rows(torch.utils.data.IterableDataset):
    """Ten rows of unknown number: an epoch of 5 passes of 2, so a step of 4 passes and one of 1."""

    def __iter__(self):
        return iter([{"input_ids": row, "labels": row} for row in batch(10)])


@pytest.mark.parametrize("attached", [True, False])
def test_data_without_a_length(tmp_path, caplog, attached):
    type(modeling_deepseek.logger).warning_once.cache_clear()
    told = []

    class Told(TrainerCallback):
        def on_substep_end(self, args, state, control, model=None, **kwargs):
            told.append(model.model.pass_weight.num_passes)

        on_step_end = on_substep_end

    trainer = make_trainer(
        tmp_path, rows=Rows(), num_steps=3, callbacks=[], per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    if attached:
        ExpertBalanceCallback.attach(trainer)
    else:
        trainer.add_callback(ExpertBalanceCallback())
    trainer.add_callback(Told())
    trainer.train()
    assert told[:5] == [4, 4, 4, 4, 1 if attached else 4]
    said = sum("the data have no length" in record.getMessage() for record in caplog.records)
    assert said == (0 if attached else 1)


# Settings ------------------------------------------------------------------------------------------------------------


def stock_model(cls=DeepseekV3ForCausalLM):
    known = cls.config_class().to_dict().keys()
    torch.manual_seed(0)
    return cls(cls.config_class(**{key: value for key, value in TINY.items() if key in known}))


def dense_model():
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, hidden_size=24, intermediate_size=32, num_hidden_layers=1,
                                        num_attention_heads=2, num_key_value_heads=2))  # fmt: skip


def mixtral_model():
    config = MixtralConfig(vocab_size=61, hidden_size=24, intermediate_size=32, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)  # fmt: skip
    return MixtralForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (
            dense_model,
            {"bias_update_speed": 0.1},
            "bias_update_speed: got 0.1 for LlamaForCausalLM, expected None",
        ),
        (dense_model, {"router_z_loss_coef": 0.1}, "for LlamaForCausalLM, expected 0; it has no router"),
        (mixtral_model, {"bias_update_speed": 0.1}, "no balancing bias (seq_aux_loss_coef balances them)"),
        (build, {"seq_aux_loss_coef": 0.1}, "for DeepseekRouter, expected 0; set them in the model's configuration"),
    ],
)
def test_a_setting_without_effect_is_refused(make, settings, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        ExpertBalanceCallback(**settings).begin(make())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [stock_model, mixtral_model, build])
@pytest.mark.parametrize("setting", ["bias_update_speed", "seq_aux_loss_coef", "router_z_loss_coef"])
def test_each_setting_changes_a_training_or_is_refused(make, setting):
    """Gradients or the bias after one step, against a callback without settings."""
    found = []
    for settings in ({}, {setting: 0.5}):
        model, callback = make().train(), ExpertBalanceCallback(**settings)
        try:
            callback.begin(model)
        except ValueError as error:
            assert setting in str(error)
            return
        model(batch(), labels=batch()).loss.backward()
        callback.finish_step()
        biases = [layer.bias for layer in find_moe_layers(model) if layer.bias is not None]
        found.append([*(router.weight.grad for router in find_routers(model)), *biases])
    assert any(not torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_bias_in_bf16_is_widened_and_moves(caplog):
    type(modeling_deepseek.logger).warning_once.cache_clear()
    model = stock_model().bfloat16().train()
    (owner,) = {layer.bias_owner[0] for layer in find_moe_layers(model)[:1]}
    owner.e_score_correction_bias.fill_(0.5)
    callback = ExpertBalanceCallback(bias_update_speed=0.001)
    callback.begin(model)
    model(batch()).logits.sum().backward()
    callback.finish_step()
    assert owner.e_score_correction_bias.dtype == torch.float32 and owner.e_score_correction_bias.unique().numel() > 1
    assert sum("where steps of 0.001 are lost" in record.getMessage() for record in caplog.records) == 1


def test_a_training_that_ends_collapsed_says_so(tmp_path, caplog):
    model = build()
    for router in find_routers(model):
        router.e_score_correction_bias[:3] = 9.0
    run_trainer(tmp_path, model=model, callbacks=[ExpertBalanceCallback()])
    assert not [r for r in caplog.records if "load_imbalance_max" in r.getMessage()], "8 experts, 3 used: 2.7 at most"
    model = build(n_routed_experts=16)
    for router in find_routers(model):
        router.e_score_correction_bias[:3] = 9.0
    run_trainer(tmp_path, model=model, callbacks=[ExpertBalanceCallback()])
    (said,) = [record.getMessage() for record in caplog.records if "load_imbalance_max" in record.getMessage()]
    assert said.startswith("load_imbalance_max: got 5.3 at step 3, expected at most 4, with 26 idle experts;")


def test_a_loaded_checkpoint_keeps_its_bias_unless_asked(tmp_path):
    model = build(**BALANCED)
    model.save_pretrained(tmp_path)
    assert DeepseekForCausalLM.from_pretrained(tmp_path).config.router_bias_update_speed == 0
    asked = DeepseekForCausalLM.from_pretrained(tmp_path, router_bias_update_speed=0.003)
    assert asked.config.router_bias_update_speed == 0.003
    with pytest.raises(ValueError, match="bias_update_speed: got -1, expected"):
        ExpertBalanceCallback(bias_update_speed=-1)
    with pytest.raises(ValueError, match="bias_update_speed: got '1e-3', expected a number"):
        ExpertBalanceCallback("1e-3")  # as YAML reads it


def test_the_callbacks_speed_is_the_runs_and_not_the_models(tmp_path):
    """Neither the checkpoint saved on the way nor the model afterwards has it; a later run keeps the bias still."""
    callback = ExpertBalanceCallback(bias_update_speed=0.05)
    model, _ = run_trainer(tmp_path, callbacks=[callback], num_steps=2, save_strategy="steps", save_steps=1)
    moved = [router.e_score_correction_bias.clone() for router in find_routers(model)]
    assert all(0.05 < bias.max() - bias.min() < 0.21 for bias in moved), "two steps up to 0.05 to either side"
    saved = json.loads((tmp_path / "checkpoint-1" / "config.json").read_text())
    assert saved["router_bias_update_speed"] == model.config.router_bias_update_speed == 0.01
    model.config.router_bias_update_speed = 0.0
    run_trainer(tmp_path, model=model)
    for router, bias in zip(find_routers(model), moved, strict=True):
        assert torch.equal(router.e_score_correction_bias, bias)
