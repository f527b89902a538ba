"""What must not change a training does not, and each of these comparisons notices the naive version.

Beside the weights, biases and shares of `test_balance`: the counters of the experts, every parameter's gradient for
packed against padded batches, the cache, and bf16 autocast. `test_the_comparison_notices` writes our code as it is
commonly written, one fault at a time, and wants the comparison to fail.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from deepseek_training.balance.callback import ExpertBalanceCallback, find_routers
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM, modeling_deepseek
from modeling_deepseek.expert_load import ExpertLoad

# Weights a hundred times the usual, so that a lost or doubled auxiliary gradient cannot hide behind the main one.
SETTINGS = {"router_bias_update_speed": 0.01, "seq_aux_loss_coef": 0.5, "router_z_loss_coef": 0.2}
ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
CHECKPOINTED = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
REENTRANT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}


def build(**settings):
    torch.manual_seed(0)
    model = DeepseekForCausalLM(DeepseekConfig.from_preset("debug", vocab_size=61, **SETTINGS, **settings))
    for router in find_routers(model):
        torch.nn.init.normal_(router.weight, std=0.3)
    return model.train()


def batch(rows=8, length=15):
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(0))


def train(folder, callback=None, *, num_rows=8, settings=None, resume=None, **arguments):
    """Two steps of plain SGD on the same eight rows; the model and the load of its experts."""
    model, callback = build(**(settings or {})), callback or ExpertBalanceCallback()
    rows = [{"input_ids": row, "labels": row} for row in batch(num_rows)]
    options = {"per_device_train_batch_size": 8, "max_steps": 2, "optim": "sgd", "learning_rate": 0.5, **arguments}
    options |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1}
    options = {"save_strategy": "no", **options}
    arguments = TrainingArguments(folder, use_cpu=True, report_to=[], disable_tqdm=True, **options)
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train(resume)
    return model, callback.tokens_per_expert


def assert_same(one, other, tolerance=2e-5):
    (expected, load), (found, other_load) = one, other
    assert torch.equal(load, other_load), "counters"
    values = found.state_dict()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(
            values[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n} {m}"
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    "arguments",
    [ACCUMULATED, CHECKPOINTED, REENTRANT, {**ACCUMULATED, **CHECKPOINTED}, {**ACCUMULATED, **REENTRANT}],
    ids=["accumulated", "checkpointed", "reentrant", "accumulated, checkpointed", "accumulated, reentrant"],
)
def test_weights_biases_shares_and_counters(tmp_path, whole, arguments):
    assert_same(whole, train(tmp_path, **arguments))
    assert whole[1].sum() > 0 and all(router.e_score_correction_bias.any() for router in find_routers(whole[0]))


@pytest.mark.parametrize("settings", [{}, {"num_nextn_predict_layers": 1, "mtp_loss_coef": 2.0}], ids=["", "mtp"])
@pytest.mark.parametrize("num_rows", [10, 14])
def test_a_shorter_last_accumulation_of_an_epoch(tmp_path, num_rows, settings):
    """Eight rows as four passes, then two or six as one or three; twice, so that a whole step follows a short one."""
    options = {"num_rows": num_rows, "settings": settings, "max_steps": 4, "learning_rate": 0.02}
    whole = train(tmp_path / "whole", **options)
    assert_same(whole, train(tmp_path / "parts", **options, **ACCUMULATED))


def test_a_resumed_epoch_knows_its_shorter_last_accumulation(tmp_path):
    """Where the data are not skipped, the steps taken do not tell where in the epoch a step is."""
    options = {
        "num_rows": 10,
        "learning_rate": 0.02,
        "ignore_data_skip": True,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    found = []
    for name, accumulation in (("whole", {}), ("parts", ACCUMULATED)):
        train(tmp_path / name, **{**options, **accumulation, "max_steps": 1})
        resume = tmp_path / name / "checkpoint-1"
        found.append(train(tmp_path / name, **{**options, **accumulation, "max_steps": 3}, resume=resume))
    assert_same(*found)


class UpdatesAtEachPass(ExpertBalanceCallback):
    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self.finish_step(model)


class UpdatesNotCentred(ExpertBalanceCallback):
    def finish_step(self, model):
        super().finish_step(model)
        for router in find_routers(model):
            router.e_score_correction_bias += 0.001


def admits_recomputation(load, training):
    return training and torch.is_grad_enabled()


def admits_first_run_only(load, training):
    return training and torch._C._current_graph_task_id() == -1


@pytest.mark.parametrize(
    ("arguments", "callback", "faults"),
    [
        (ACCUMULATED, None, {"loss_scale": property(lambda load: 1.0)}),  # four times the auxiliary losses
        (ACCUMULATED, UpdatesAtEachPass, {}),
        (ACCUMULATED, UpdatesNotCentred, {}),
        (CHECKPOINTED, None, {"admits": admits_recomputation}),  # counts twice
        (REENTRANT, None, {"admits": admits_first_run_only, "loss_scale": property(lambda load: 0.0)}),
    ],
    ids=["not divided by passes", "bias moves each pass", "bias drifts", "counts twice", "loss lost in recomputation"],
)
def test_the_comparison_notices(tmp_path, whole, monkeypatch, arguments, callback, faults):
    for name, fault in faults.items():
        monkeypatch.setattr(ExpertLoad, name, fault)
    found = train(tmp_path, callback() if callback else None, **arguments)
    with pytest.raises(AssertionError):
        assert_same(whole, found)


# Packing, padding and the cache --------------------------------------------------------------------------------------

LENGTHS = [15, 4, 9, 11]


def gradients(model, **inputs):
    """Gradients of the whole loss, summed over tokens so that it does not depend on how they are laid out."""
    model.zero_grad()
    model(**inputs, num_items_in_batch=torch.tensor(10.0)).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def padded(side):
    rows, width = batch(4), max(LENGTHS)
    mask = torch.zeros(4, width, dtype=torch.long)
    placed = torch.zeros_like(rows)
    for row, length in enumerate(LENGTHS):
        where = slice(0, length) if side == "right" else slice(width - length, width)
        mask[row, where], placed[row, where] = 1, rows[row, :length]
    return {"input_ids": placed, "attention_mask": mask, "labels": placed.masked_fill(mask == 0, -100)}


def packed(**extra):
    ids = torch.cat([row[:length] for row, length in zip(batch(4), LENGTHS, strict=True)]).unsqueeze(0)
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100), **extra}


def assert_same_gradients(expected, found, tolerance=1e-5):
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=float(tolerance * scale + 1e-7), msg=lambda m, n=name: f"{n} {m}"
        )


def counts(model):
    return torch.stack([router.load.tokens_per_expert for router in find_routers(model)])


@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_equals_padded_in_every_gradient(side):
    one, other = build(), build()
    expected, found = gradients(one, **padded(side)), gradients(other, **packed())
    assert_same_gradients(expected, found)
    assert torch.equal(counts(one), counts(other))


def test_packed_against_padded_notices_a_pooled_loss_and_counted_padding(monkeypatch):
    expected = build()
    wanted = gradients(expected, **padded("right"))
    monkeypatch.setattr(modeling_deepseek, "make_layout", lambda *args: None)
    blind = build()
    with pytest.raises(AssertionError):
        assert_same_gradients(wanted, gradients(blind, **packed()))
    blind = build()
    gradients(blind, **padded("right"))
    assert not torch.equal(counts(expected), counts(blind))


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_cache_changes_no_gradient(use_cache):
    one, other = build(), build()
    expected = gradients(one, **padded("right"))
    found = gradients(other, **padded("right"), use_cache=use_cache)
    assert_same_gradients(expected, found)
    assert torch.equal(counts(one), counts(other))


def test_a_configured_cache_does_not_mix_packed_sequences():
    """With a cache, transformers lets the sequences of a pack see one another; `use_cache` is True by default."""
    model = build()
    assert model.config.use_cache
    expected = gradients(build(), **padded("right"))
    assert_same_gradients(expected, gradients(model, **packed()))
    with pytest.raises(AssertionError):
        assert_same_gradients(expected, gradients(build(), **packed(use_cache=True)))


# bf16 autocast -------------------------------------------------------------------------------------------------------


def test_bf16_autocast(tmp_path):
    """Rounding sends a few tokens elsewhere; weights, load and bias stay close, and the bias stays fp32."""
    whole = train(tmp_path, learning_rate=0.05)
    model, load = train(tmp_path, learning_rate=0.05, bf16=True)
    moved = (load - whole[1]).abs().sum() / whole[1].sum()
    assert moved < 0.05
    untrained = build().state_dict()
    values = model.state_dict()
    for name, value in whole[0].state_dict().items():
        if name.endswith("e_score_correction_bias"):
            assert values[name].dtype == torch.float32 and values[name].abs().max() > 0.005
            # An expert as good as evenly loaded may be pushed the other way.
            assert ((values[name] - value).abs() < 0.005).float().mean() > 0.7
        elif not name.endswith("share.state"):
            change = (value - untrained[name]).norm()
            assert (values[name] - value).norm() < 0.25 * change + 1e-6, name  # an expert that a token has left


# Several processes ---------------------------------------------------------------------------------------------------


RANK = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_invariances import count_on_a_rank
count_on_a_rank(sys.argv[2], int(sys.argv[3]), sys.argv[4])
"""


def count_on_a_rank(folder, rank, kind):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/{kind}", rank=rank, world_size=2)
    all_reduce = torch.distributed.all_reduce
    if kind == "local":
        torch.distributed.all_reduce = lambda tensor: None
    model, callback = build(), ExpertBalanceCallback()
    model(batch()[rank::2]).logits.sum().backward()
    callback.finish_step(model)
    torch.save([router.e_score_correction_bias for router in find_routers(model)], f"{folder}/{kind}{rank}.pt")
    all_reduce(torch.zeros(1))  # the first to end would cut the other's connection


@pytest.mark.slow
def test_ranks_agree_on_the_bias_only_because_counts_are_summed(tmp_path):
    alone, callback = build(), ExpertBalanceCallback()
    alone(batch()).logits.sum().backward()
    callback.finish_step(alone)
    expected = [router.e_score_correction_bias for router in find_routers(alone)]
    for kind in ("summed", "local"):
        command = [sys.executable, "-c", RANK, str(Path(__file__).parents[1]), str(tmp_path)]
        ranks = [subprocess.Popen([*command, str(rank), kind]) for rank in range(2)]
        assert [rank.wait(120) for rank in ranks] == [0, 0]
        for rank in range(2):
            found = torch.load(tmp_path / f"{kind}{rank}.pt")
            assert all(map(torch.equal, found, expected)) == (kind == "summed")
