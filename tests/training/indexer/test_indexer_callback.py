"""The callback in a Trainer: what must not change a training does not, and the indexer learns."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from indexer_models import build, indexer_parameters, layers_of
from peft import LoraConfig, get_peft_model
from tiny_families import token_ids
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from deepseek_records.activation_checkpointing import checkpointing_setting, enable_checkpointing
from deepseek_training.balance import ExpertBalanceCallback
from deepseek_training.indexer import IndexerTrainingCallback
from deepseek_training.indexer.callback import _refuse_settings, _refuse_unused_parameters
from deepseek_training.indexer.indexer_observer import _AttachGradients

ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
CHECKPOINTED = checkpointing_setting(True, use_reentrant=False)
REENTRANT = checkpointing_setting(True, use_reentrant=True)


def small():
    return build("deepseek_v32", num_hidden_layers=2)


def make_trainer(folder, model, *, rows=8, data=None, **arguments):
    options = {"per_device_train_batch_size": 8, "max_steps": 3, "optim": "sgd", "learning_rate": 0.5}
    options |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no"}
    options |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, **arguments}
    data = [{"input_ids": row, "labels": row} for row in token_ids(rows, 20)] if data is None else data
    return Trainer(model, TrainingArguments(folder, **options), train_dataset=data)


def train(folder, *, warmup_steps=1, resume=None, loss_coef=1.0, **arguments):
    trainer = make_trainer(folder, small(), **arguments)
    IndexerTrainingCallback.attach(trainer, warmup_steps=warmup_steps, loss_coef=loss_coef)
    trainer.train(resume)
    return trainer


def figures(trainer, name="indexer_kl"):
    return [line[name] for line in trainer.state.log_history if name in line]


def assert_same(one, other, tolerance=2e-5):
    assert figures(other) == pytest.approx(figures(one), rel=1e-3)
    values = other.model.state_dict()
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(
            values[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n} {m}"
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    "arguments",
    [
        ACCUMULATED,
        CHECKPOINTED,
        REENTRANT,
        pytest.param({**ACCUMULATED, **CHECKPOINTED}, marks=pytest.mark.slow),
    ],
    ids=["accumulated", "checkpointed", "reentrant", "accumulated, checkpointed"],
)
def test_accumulation_and_checkpointing_change_nothing(tmp_path, whole, arguments):
    assert_same(whole, train(tmp_path, **arguments))
    before = small().state_dict()
    assert all(not torch.equal(value, before[name]) for name, value in indexer_parameters(whole.model).items())


@pytest.mark.slow
def test_the_comparison_notices_a_loss_that_is_not_divided(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(IndexerTrainingCallback, "begin_step", with_one_pass(IndexerTrainingCallback.begin_step))
    found = train(tmp_path, **ACCUMULATED)
    assert figures(found)[0] == pytest.approx(figures(whole)[0])
    with pytest.raises(AssertionError):
        assert_same(whole, found)


def with_one_pass(begin_step):
    return lambda self, model, step, num_passes=1: begin_step(self, model, step)


def test_the_log_tells_the_divergence_and_in_the_warm_up_the_recall(whole):
    assert len(figures(whole)) == 3 and len(figures(whole, "indexer_recall")) == 1
    assert all(value > 0 for value in figures(whole)) and 0 < figures(whole, "indexer_recall")[0] < 1


def test_the_main_model_is_frozen_in_the_warm_up_and_trained_as_without_after_it(tmp_path):
    before = small().state_dict()
    warm = train(tmp_path / "warm", warmup_steps=3).model
    names = indexer_parameters(warm).keys()
    for name, value in warm.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in names), name
    assert all(parameter.requires_grad for parameter in warm.parameters())
    alone = make_trainer(tmp_path / "alone", small(), max_steps=1)
    alone.train()
    with_loss = train(tmp_path / "with", warmup_steps=0, max_steps=1).model.state_dict()
    for name, value in alone.model.state_dict().items():
        assert torch.equal(value, with_loss[name]) == (name not in names), name


@pytest.mark.parametrize("step", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_training_goes_on_as_it_would_have(tmp_path, step):
    """Stopped after the first of two warm-up steps, and after the second."""
    options = {"warmup_steps": 2, "max_steps": 3, "optim": "adamw_torch", "learning_rate": 0.01}
    straight = train(tmp_path / "straight", save_strategy="steps", save_steps=1, **options)
    resumed = train(tmp_path / "resumed", resume=tmp_path / "straight" / f"checkpoint-{step}", **options)
    assert figures(resumed) == figures(straight)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


# Padding and packing -------------------------------------------------------------------------------------------------

LENGTHS = [20, 9, 14, 17]
ROWS = token_ids(4, 20)


def gradients(family, is_dense, **inputs):
    model = build(family)
    callback = IndexerTrainingCallback(warmup_steps=1)
    callback.begin(model)
    callback.begin_step(model, 0 if is_dense else 1)
    model(**inputs, use_cache=False).logits.float().logsumexp(-1).sum().backward()
    divergence = callback._observer.figures["kl"].item()
    callback.end()
    return {name: parameter.grad for name, parameter in indexer_parameters(model).items()}, divergence


def padded(side):
    mask, placed = torch.zeros(4, 20, dtype=torch.long), torch.full((4, 20), 5)
    for row, length in enumerate(LENGTHS):
        where = slice(0, length) if side == "right" else slice(20 - length, 20)
        mask[row, where], placed[row, where] = 1, ROWS[row, :length]
    return {"input_ids": placed, "attention_mask": mask}


def packed():
    ids = torch.cat([row[:length] for row, length in zip(ROWS, LENGTHS, strict=True)]).unsqueeze(0)
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)}


@pytest.mark.parametrize("is_dense", [True, False], ids=["dense", "sparse"])
def test_packed_equals_padded(is_dense):
    expected, divergence = gradients("deepseek_v32", is_dense, **packed())
    for side in ("right", "left"):
        found, other = gradients("deepseek_v32", is_dense, **padded(side))
        assert other == pytest.approx(divergence, rel=1e-4)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n} {m}")


@pytest.mark.parametrize("family", ["glm_moe_dsa", "deepseek_v4"])
def test_padding_on_the_right_changes_nothing(family):
    """Four rows of one length, alone and with five tokens of padding behind them."""
    longer = {"input_ids": torch.cat([ROWS, torch.full((4, 5), 7)], 1)}
    longer["attention_mask"] = torch.cat([torch.ones(4, 20, dtype=torch.long), torch.zeros(4, 5, dtype=torch.long)], 1)
    expected, divergence = gradients(family, True, input_ids=ROWS, attention_mask=torch.ones_like(ROWS))
    found, other = gradients(family, True, **longer)
    assert other == pytest.approx(divergence, rel=1e-4)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n} {m}")


def test_evaluation_and_passes_without_gradients_are_left_alone():
    model = small()
    callback = IndexerTrainingCallback()
    callback.begin(model)
    with torch.no_grad():
        model(ROWS)
    model.eval()(ROWS).logits.sum().backward()
    assert not callback._observer.figures and all(p.grad is None for p in indexer_parameters(model).values())
    callback.end()


def test_bf16_autocast_reaches_every_tensor(tmp_path, whole):
    """Also those whose weights autocast has cast before, for the run without gradients."""
    trainer = train(tmp_path, bf16=True)
    before = small().state_dict()
    for name, value in indexer_parameters(whole.model).items():
        change, other = value - before[name], trainer.model.state_dict()[name] - before[name]
        assert torch.nn.functional.cosine_similarity(change.flatten(), other.flatten(), dim=0) > 0.9, name


# Learning ------------------------------------------------------------------------------------------------------------


def copy_rows(number, seed):
    """Eleven tokens, then the same again: from there on each answer stands eleven places before."""
    half = token_ids(number, 11, seed=seed)
    return [{"input_ids": row, "labels": row} for row in torch.cat([half, half], 1)]


@pytest.mark.slow
def test_the_indexer_learns_where_the_attention_looks(tmp_path):
    """A model trained on copying, then its indexer; the frozen one is that of a training without the callback."""
    model = build("deepseek_v32")
    for layer in layers_of(model):
        layer.indexer.index_topk = 22  # dense while it learns to copy
    options = {"optim": "adamw_torch", "per_device_train_batch_size": 32}
    make_trainer(
        tmp_path / "copy", model, data=copy_rows(2048, 0), max_steps=400, learning_rate=3e-3, **options
    ).train()
    for layer in layers_of(model):
        layer.indexer.index_topk = 4
    trainer = make_trainer(
        tmp_path / "warm", model, data=copy_rows(2048, 1), max_steps=300, learning_rate=1e-2, **options
    )
    IndexerTrainingCallback.attach(trainer, warmup_steps=300)
    trainer.train()
    divergence, recall = figures(trainer), figures(trainer, "indexer_recall")
    divergence[-1], recall[-1] = sum(divergence[-10:]) / 10, sum(recall[-10:]) / 10
    print(f"divergence {divergence[0]:.2f} to {divergence[-1]:.2f}, recall {recall[0]:.2f} to {recall[-1]:.2f}")
    assert divergence[-1] < 0.1 * divergence[0]
    assert recall[0] < 0.6 and recall[-1] > 0.88


def test_deepseek_v4_with_fused_experts_and_a_moving_bias(tmp_path):
    """Clamped experts, sqrt-softplus scores with a bias, and the indexer, in one training."""
    model = build("deepseek_v4")
    model.set_experts_implementation("fused_moe")
    trainer = make_trainer(tmp_path, model, max_steps=2)
    IndexerTrainingCallback.attach(trainer)
    ExpertBalanceCallback.attach(trainer, bias_update_speed=0.01)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    trained = {name for name, _ in model.named_parameters()}
    biases = {name for name in before if name.endswith("e_score_correction_bias")}
    assert biases and trained | biases <= moved
    assert len(figures(trainer)) == 2 and len(figures(trainer, "load_imbalance")) == 2


@pytest.mark.slow
def test_the_divergence_falls_within_eight_steps_and_stays_without_the_loss(tmp_path):
    options = {"optim": "adamw_torch", "learning_rate": 0.03, "max_steps": 8, "warmup_steps": 8}
    learned = figures(train(tmp_path / "learned", data=copy_rows(8, 0), **options))
    still = figures(
        train(tmp_path / "still", data=copy_rows(8, 0), loss_coef=1e-30, **{**options, "optim": "sgd", "max_steps": 3})
    )
    assert learned[-1] < 0.7 * learned[0]
    assert still == pytest.approx([still[0]] * 3) and still[0] == pytest.approx(learned[0])


def test_with_lora_the_saved_copies_of_the_indexers_are_trained(tmp_path):
    adapter = LoraConfig(target_modules=["q_b_proj"], modules_to_save=["indexer"], init_lora_weights=False)
    model = get_peft_model(small(), adapter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(tmp_path, model, max_steps=1)
    IndexerTrainingCallback.attach(trainer, warmup_steps=1)
    trainer.train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    copies = {name for name in before if ".indexer.modules_to_save." in name}
    assert copies and moved == copies and figures(trainer, "indexer_recall")
    with pytest.raises(ValueError, match=r"frozen, .* with LoRA pass PEFT modules_to_save=\['indexer'\]"):
        IndexerTrainingCallback().begin(get_peft_model(small(), LoraConfig(target_modules=["q_b_proj"])))


# Refusals ------------------------------------------------------------------------------------------------------------


def llama():
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, num_key_value_heads=2, **sizes))


def frozen():
    model = small()
    for parameter in indexer_parameters(model).values():
        parameter.requires_grad_(False)
    return model


def flash():
    model = small()
    model.config._attn_implementation = "flash_attention_2"
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (llama, "model: got LlamaForCausalLM, expected one whose attention has an indexer"),
        (frozen, "indexer: got .* frozen, expected parameters that require a gradient"),
        (flash, "attn_implementation: got flash_attention_2, expected eager or sdpa"),
    ],
    ids=["no indexer", "frozen", "flash"],
)
def test_what_cannot_work_is_refused_in_one_line(tmp_path, make, message):
    trainer = make_trainer(tmp_path, make())
    IndexerTrainingCallback.attach(trainer)
    with pytest.raises(ValueError, match=message) as error:
        trainer.train()
    assert "\n" not in str(error.value)


ALLOWED = {"fp16": False, "torch_compile": False, "fsdp": [], "deepspeed": None, "n_gpu": 1}


@pytest.mark.parametrize("name", ALLOWED)
def test_settings_that_the_loss_does_not_go_with(name):
    _refuse_settings(SimpleNamespace(**ALLOWED))
    with pytest.raises(ValueError, match=f"{name}: got 2 .*with an indexer's loss, expected .*; ") as error:
        _refuse_settings(SimpleNamespace(**{**ALLOWED, name: 2}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("world_size", "finds", "is_checkpointed", "is_refused"),
    [
        (1, False, True, False),
        (2, None, False, False),
        (2, None, True, True),
        (2, True, True, False),
        (2, False, False, True),
    ],
)
def test_a_frozen_model_needs_ddp_to_look_for_unused_parameters(world_size, finds, is_checkpointed, is_refused):
    model = llama()
    if is_checkpointed:
        enable_checkpointing(model)
    arguments = SimpleNamespace(world_size=world_size, ddp_find_unused_parameters=finds)
    with pytest.raises(ValueError, match="ddp_find_unused_parameters: got") if is_refused else nullcontext():
        _refuse_unused_parameters(arguments, model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps: got -1, expected a whole number of at least 0"),
        ({"warmup_steps": 0.1}, "warmup_steps: got 0.1, expected a whole number"),
        ({"loss_coef": 0.0}, "loss_coef: got 0.0, expected a number above 0; 0 trains no indexer"),
        ({"loss_coef": float("nan")}, "loss_coef: got nan, expected a number above 0"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        IndexerTrainingCallback(**settings)


def test_attach_on_an_instance_is_refused(tmp_path):
    with pytest.raises(TypeError, match="expected IndexerTrainingCallback"):
        IndexerTrainingCallback(3).attach(make_trainer(tmp_path, llama()))


def test_the_hooks_are_gone_after_training(whole):
    model = whole.model
    model(ROWS, labels=ROWS).loss.backward()
    assert all(parameter.grad is None for parameter in indexer_parameters(model).values())
    model.zero_grad()


def test_attached_gradients_leave_the_tensors_as_it_was():
    tensor, parameter = torch.randn(3, requires_grad=True), torch.nn.Parameter(torch.randn(2))
    known = torch.tensor([1.0, 2.0])
    (3 * _AttachGradients.apply(tensor, [known], parameter)).sum().backward()
    assert torch.equal(parameter.grad, known) and torch.equal(tensor.grad, torch.full((3,), 3.0))


# Several processes ---------------------------------------------------------------------------------------------------

RANK = """
import sys
sys.path[:0] = sys.argv[1].split(":")
from test_indexer_callback import train_on_a_rank
train_on_a_rank(sys.argv[2])
"""


def train_on_a_rank(folder):
    trainer = train(Path(folder) / "out", per_device_train_batch_size=4, warmup_steps=1, dataloader_drop_last=False)
    if trainer.args.process_index == 0:
        torch.save((trainer.model.state_dict(), figures(trainer)), Path(folder) / "found.pt")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, whole):
    """Two halves of the batch on two ranks of DDP: one row more or less is a row of the same mean."""
    here = Path(__file__).parent
    folders = ":".join(str(folder) for folder in (here, here.parent, here.parents[2] / "dev"))
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    run = subprocess.run([sys.executable, *command, str(script), folders, str(tmp_path)], timeout=280)
    assert run.returncode == 0
    values, logged = torch.load(tmp_path / "found.pt")
    assert logged == pytest.approx(figures(whole), rel=1e-3)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(values[name], value, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n} {m}")
