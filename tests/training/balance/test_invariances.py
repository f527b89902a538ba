"""What must not change a training does not, and each of these comparisons notices the naive version.

Held for our model, which balances by its configuration, and for transformers' own DeepSeek-V3, which the callback
balances: weights, biases, shares, the counters of the experts, every parameter's gradient for packed against padded
batches, the cache, and bf16 autocast. `test_the_comparison_notices` writes our code as it is commonly written, one
fault at a time, and wants the comparison to fail.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moe_routers import find_routers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Trainer, TrainingArguments

from deepseek_records.activation_checkpointing import checkpointing_setting
from deepseek_training.balance import routing_observer
from deepseek_training.balance.callback import ExpertBalanceCallback
from deepseek_training.balance.routing_observer import RouterLosses, RoutingObserver
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM, modeling_deepseek
from modeling_deepseek.token_layout import one_sequence

# Weights a hundred times the usual, so that a lost or doubled auxiliary gradient cannot hide behind the main one.
LOSSES = {"seq_aux_loss_coef": 0.5, "router_z_loss_coef": 0.2}
SETTINGS = {"router_bias_update_speed": 0.01, **LOSSES}
ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
CHECKPOINTED = checkpointing_setting(True, use_reentrant=False)
REENTRANT = checkpointing_setting(True, use_reentrant=True)


def build(**settings):
    torch.manual_seed(0)
    model = DeepseekForCausalLM(DeepseekConfig.from_preset("debug", vocab_size=61, **SETTINGS, **settings))
    return with_wide_gates(model)


def build_stock(**settings):
    """transformers' own model of the same sizes, which has neither losses nor a number of experts that varies."""
    torch.manual_seed(0)
    ours = DeepseekConfig.from_preset("debug", vocab_size=61).to_dict()
    known = DeepseekV3Config().to_dict().keys() - {"model_type", "architectures", "auto_map"}
    config = DeepseekV3Config(**{key: value for key, value in ours.items() if key in known})
    return with_wide_gates(DeepseekV3ForCausalLM(config))


def with_wide_gates(model):
    for router in find_routers(model):
        torch.nn.init.normal_(router.weight, std=0.3)
    return model.train()


BUILDERS = {"ours": build, "stock": build_stock}


def make_callback(family, cls=ExpertBalanceCallback):
    return cls() if family == "ours" else cls(bias_update_speed=0.01, **LOSSES)


def batch(rows=8, length=15):
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(0))


def train(folder, callback=None, *, family="ours", num_rows=8, settings=None, resume=None, **arguments):
    """Two steps of plain SGD on the same eight rows; the model and the load of its experts."""
    model, callback = BUILDERS[family](**(settings or {})), callback or make_callback(family)
    rows = [{"input_ids": row, "labels": row} for row in batch(num_rows)]
    options = {"per_device_train_batch_size": 8, "max_steps": 2, "optim": "sgd", "learning_rate": 0.5, **arguments}
    options |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1}
    options = {"save_strategy": "no", **options}
    arguments = TrainingArguments(folder, use_cpu=True, report_to=[], disable_tqdm=True, **options)
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train(resume)
    return model, torch.stack(callback.tokens_per_expert)


def assert_same(one, other, tolerance=2e-5):
    (expected, load), (found, other_load) = one, other
    assert torch.equal(load, other_load), "counters"
    values = found.state_dict()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(
            values[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n} {m}"
        )


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    return {family: train(tmp_path_factory.mktemp(family), family=family) for family in BUILDERS}


@pytest.fixture
def whole(wholes):
    return wholes["ours"]


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize(
    "arguments",
    [
        ACCUMULATED,
        *(pytest.param(alone, marks=pytest.mark.slow) for alone in (CHECKPOINTED, REENTRANT)),
        {**ACCUMULATED, **CHECKPOINTED},
        {**ACCUMULATED, **REENTRANT},
    ],
    ids=["accumulated", "checkpointed", "reentrant", "accumulated, checkpointed", "accumulated, reentrant"],
)
def test_weights_biases_shares_and_counters(tmp_path, wholes, family, arguments):
    whole = wholes[family]
    assert_same(whole, train(tmp_path, family=family, **arguments))
    assert whole[1].sum() > 0 and all(router.e_score_correction_bias.any() for router in find_routers(whole[0]))


@pytest.mark.parametrize(
    ("family", "settings"),
    [("ours", {}), ("ours", {"num_nextn_predict_layers": 1, "mtp_loss_coef": 2.0}), ("stock", {})],
    ids=["ours", "mtp", "stock"],
)
@pytest.mark.parametrize("num_rows", [14, pytest.param(10, marks=pytest.mark.slow)])
def test_a_shorter_last_accumulation_of_an_epoch(tmp_path, num_rows, family, settings):
    """Eight rows as four passes, then two or six as one or three; twice, so that a whole step follows a short one."""
    options = {"family": family, "num_rows": num_rows, "settings": settings, "max_steps": 4, "learning_rate": 0.02}
    whole = train(tmp_path / "whole", **options)
    assert_same(whole, train(tmp_path / "parts", **options, **ACCUMULATED))


@pytest.mark.slow
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
    def on_substep_end(self, args, state, control, **kwargs):
        self.finish_step()


class UpdatesNotCentered(ExpertBalanceCallback):
    def finish_step(self):
        super().finish_step()
        for layer in self._observer.layers:
            layer.bias.add_(0.001)


class DoesNotKnowOfPasses(ExpertBalanceCallback):
    def _set_passes(self, model, num_passes):
        super()._set_passes(model, 1)


def leave_the_pass_open(observer, place, decoder, args, output):
    """So that a layer which the backward pass runs again counts again."""


def attach_in_first_runs_only(observer, number, place, router, args, output):
    return SEE(observer, number, place, router, args, output) if observer._open[place] else None


SEE = RoutingObserver._see


@pytest.mark.parametrize(
    ("family", "arguments", "callback", "faults"),
    [
        ("ours", ACCUMULATED, DoesNotKnowOfPasses, {}),  # four times the auxiliary losses
        ("stock", ACCUMULATED, DoesNotKnowOfPasses, {}),
        ("ours", ACCUMULATED, UpdatesAtEachPass, {}),
        ("ours", ACCUMULATED, UpdatesNotCentered, {}),
        ("ours", CHECKPOINTED, ExpertBalanceCallback, {"_end_pass": leave_the_pass_open}),
        ("stock", REENTRANT, ExpertBalanceCallback, {"_see": attach_in_first_runs_only}),
    ],
    ids=["not divided", "stock not divided", "moves each pass", "drifts", "counts twice", "lost in recomputation"],
)
@pytest.mark.slow
def test_the_comparison_notices(tmp_path, wholes, monkeypatch, family, arguments, callback, faults):
    for name, fault in faults.items():
        monkeypatch.setattr(RoutingObserver, name, fault)
    found = train(tmp_path, make_callback(family, callback), family=family, **arguments)
    with pytest.raises(AssertionError):
        assert_same(wholes[family], found)


# Packing, padding and the cache --------------------------------------------------------------------------------------

LENGTHS = [15, 4, 9, 11]


def gradients(family="ours", **inputs):
    """The load, and the gradients of the loss summed over tokens, so that it does not depend on their layout."""
    model = BUILDERS[family]()
    losses = None if family == "ours" else RouterLosses(**LOSSES)
    observer = RoutingObserver(model, losses=losses).attach()
    model(**inputs, num_items_in_batch=torch.tensor(10.0)).loss.backward()
    load = torch.stack([counts.tokens_per_expert for counts in observer.take(over_ranks=False)])
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}, load


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


def assert_same_gradients(one, other, tolerance=1e-5):
    (expected, load), (found, other_load) = one, other
    assert torch.equal(load, other_load), "counters"
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=float(tolerance * scale + 1e-7), msg=lambda m, n=name: f"{n} {m}"
        )


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_equals_padded_in_every_gradient(family, side):
    """Stock's decoder lets packed sequences see one another unless the cache is off; ours switches it off."""
    cache = {} if family == "ours" else {"use_cache": False}
    assert_same_gradients(gradients(family, **padded(side), **cache), gradients(family, **packed(), **cache))


@pytest.mark.parametrize("family", BUILDERS)
def test_packed_against_padded_notices_a_pooled_loss_and_counted_padding(monkeypatch, family):
    wanted = gradients(family, **padded("right"), use_cache=False)
    monkeypatch.setattr(modeling_deepseek, "make_layout", lambda shape, *_: one_sequence(torch.zeros(shape).flatten()))
    monkeypatch.setattr(routing_observer, "make_layout", lambda *_: None)
    blind = gradients(family, **packed(), use_cache=False)
    with pytest.raises(AssertionError, match="weight"):
        assert_same_gradients(wanted, blind)
    assert not torch.equal(wanted[1], gradients(family, **padded("right"), use_cache=False)[1])


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_cache_changes_no_gradient(use_cache):
    assert_same_gradients(gradients(**padded("right")), gradients(**padded("right"), use_cache=use_cache))


def test_a_configured_cache_does_not_mix_packed_sequences():
    """With a cache, transformers lets the sequences of a pack see one another; `use_cache` is True by default."""
    assert build().config.use_cache
    expected = gradients(**padded("right"))
    assert_same_gradients(expected, gradients(**packed()))
    with pytest.raises(AssertionError):
        assert_same_gradients(expected, gradients(**packed(use_cache=True)))


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
sys.path[:0] = sys.argv[1].split(":")
from test_invariances import count_on_a_rank
count_on_a_rank(sys.argv[2], int(sys.argv[3]), sys.argv[4])
"""


def count_on_a_rank(folder, rank, kind):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/{kind}", rank=rank, world_size=2)
    all_reduce = torch.distributed.all_reduce
    if kind == "local":
        torch.distributed.all_reduce = lambda tensor: None
    model, callback = build(), ExpertBalanceCallback()
    callback.begin(model)
    model(batch()[rank::2]).logits.sum().backward()
    callback.finish_step()
    torch.save([router.e_score_correction_bias for router in find_routers(model)], f"{folder}/{kind}{rank}.pt")
    all_reduce(torch.zeros(1))  # the first to end would cut the other's connection


@pytest.mark.slow
def test_ranks_agree_on_the_bias_only_because_counts_are_summed(tmp_path):
    alone, callback = build(), ExpertBalanceCallback()
    callback.begin(alone)
    alone(batch()).logits.sum().backward()
    callback.finish_step()
    expected = [router.e_score_correction_bias for router in find_routers(alone)]
    for kind in ("summed", "local"):
        here = Path(__file__).parent
        command = [sys.executable, "-c", RANK, f"{here}:{here.parent}", str(tmp_path)]
        ranks = [subprocess.Popen([*command, str(rank), kind]) for rank in range(2)]
        assert [rank.wait(120) for rank in ranks] == [0, 0]
        for rank in range(2):
            found = torch.load(tmp_path / f"{kind}{rank}.pt")
            assert all(map(torch.equal, found, expected)) == (kind == "summed")
