"""The figures of a training through the stock Trainer, against counts taken by hooks."""

import math

import pytest
import torch
import transformers
from moe_routers import find_routers
from packaging.version import Version
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback, TrainingArguments

from deepseek_records.activation_checkpointing import checkpointing_setting
from deepseek_training.balance import callback as callback_module
from deepseek_training.balance.callback import ExpertBalanceCallback
from deepseek_training.balance.expert_load_plot import plot_expert_load
from deepseek_training.balance.router_figures import RouterWindow, router_figures
from deepseek_training.balance.routing_observer import LayerCounts
from deepseek_training.balance.training_figures import TrainingFigures
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM
from modeling_deepseek.families import find_moe_layers

NUM_STEPS, WINDOW, BATCH, LENGTH, NUM_PADDING = 4, 2, 4, 16, 5


class Tracker(TrainerCallback):
    """Keeps what a tracker would see: `Trainer` puts those before a user's callbacks."""

    def __init__(self):
        self.rows, self.num_begun = [], 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.num_begun += 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append(dict(logs))


def train(model, folder, callbacks=(), *, balance=None, figures=False, padded=True, **options):
    """Train with callbacks in a user's list, and with `balance` and `figures` attached before the tracker."""
    mask = torch.ones(LENGTH, dtype=torch.long)
    mask[LENGTH - NUM_PADDING * padded :] = 0
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": ids, "labels": ids, "attention_mask": mask}
        for ids in torch.randint(3, 97, (NUM_STEPS * BATCH, LENGTH), generator=generator)
    ]
    arguments = TrainingArguments(
        folder, max_steps=NUM_STEPS, per_device_train_batch_size=BATCH, logging_steps=WINDOW, use_cpu=True,
        report_to=[], disable_tqdm=True, save_strategy="no", learning_rate=1e-2, **options,
    )  # fmt: skip
    tracker = Tracker()
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[tracker, *callbacks])
    attached = TrainingFigures.attach(trainer, balance=balance) if figures else None
    if balance is not None and not figures:
        balance.move_before_trackers(trainer)
    trainer.train()
    assert tracker.num_begun == 1, "moving a callback repeats none"
    return trainer, attached, [row for row in tracker.rows if "loss" in row]


def build(**settings):
    torch.manual_seed(0)
    return DeepseekForCausalLM(
        DeepseekConfig.from_preset("debug", vocab_size=97, router_bias_update_speed=0.01, **settings)
    )


def watch(model):
    """Per layer, one `(experts, number of experts, entropy)` of each real token, in order."""
    seen = [[] for _ in find_routers(model)]

    def hook(rows):
        def record(_module, _inputs, output):
            logits, weights, indices = (
                part.view(BATCH, LENGTH, -1)[:, :-NUM_PADDING].flatten(0, 1) for part in output
            )
            shares = logits.softmax(-1)
            entropies = -(shares * shares.log()).sum(-1)
            for row, weight, entropy in zip(indices.tolist(), weights.tolist(), entropies.tolist(), strict=True):
                used = [expert for expert, w in zip(row, weight, strict=True) if w > 0]
                rows.append((used, len(used), entropy))

        return record

    for rows, router in zip(seen, find_routers(model), strict=True):
        router.register_forward_hook(hook(rows))
    return seen


@pytest.mark.parametrize("mtp", [0, 1])
def test_a_tracker_sees_what_the_routers_did(tmp_path, mtp):
    model = build(**({"num_nextn_predict_layers": 1, "mtp_loss_coef": 0.3} if mtp else {}))
    seen = watch(model)
    balance = ExpertBalanceCallback()
    trainer, _, logged = train(model, tmp_path, balance=balance, figures=True)
    assert [type(callback) for callback in trainer.callback_handler.callbacks[:2]] == [
        ExpertBalanceCallback,
        TrainingFigures,
    ]
    num_tokens = WINDOW * BATCH * (LENGTH - NUM_PADDING)
    for window, row in enumerate(logged):
        layers = [rows[window * num_tokens : (window + 1) * num_tokens] for rows in seen]
        assert len(layers) == 2 + mtp
        for number, tokens in enumerate(layers):
            load = [sum(expert in used for used, _, _ in tokens) for expert in range(8)]
            assert balance.history[window].tokens_per_expert[number] == load
            mean = sum(load) / 8
            assert row[f"load_imbalance_layer_{number}"] == pytest.approx(max(load) / mean)
            assert row[f"num_idle_experts_layer_{number}"] == load.count(0)
            assert row[f"mean_experts_per_tok_layer_{number}"] == pytest.approx(sum(load) / num_tokens)
            entropy = sum(entropy for _, _, entropy in tokens) / num_tokens
            assert row[f"router_entropy_layer_{number}"] == pytest.approx(entropy, abs=1e-5)
            assert 0 < entropy <= math.log(8) + 1e-6
        counts = [count for tokens in layers for _, count, _ in tokens]
        for count in (1, 2, 3):
            assert row[f"share_of_tokens_with_{count}_experts"] == pytest.approx(counts.count(count) / len(counts))
        assert row["mean_experts_per_tok"] == pytest.approx(sum(counts) / len(counts))
        assert row["load_imbalance_max"] == max(row[f"load_imbalance_layer_{n}"] for n in range(2 + mtp))
        assert row["router_bias_range"] > 0 and 0 < row["expert_top_p"] < 1
        assert row["tokens_per_second"] > 0 and 0 < row["mfu"] < 1 and 0.1 < row["peak_memory_gib"] < 100
        assert row.items() <= trainer.state.log_history[window].items()
    assert plot_expert_load(balance.history, tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes()[:4] == b"\x89PNG"


def test_recomputation_is_not_counted_twice(tmp_path):
    figures = []
    for options in ({}, checkpointing_setting(True)):
        _, _, logged = train(build(), tmp_path, balance=ExpertBalanceCallback(), figures=True, **options)
        figures.append([{k: v for k, v in row.items() if "_experts" in k or "router" in k} for row in logged])
    for plain, recomputed in zip(*figures, strict=True):
        assert plain == pytest.approx(recomputed, rel=1e-4) and plain


def test_a_fixed_number_has_no_shares(tmp_path):
    fixed = {"min_experts_per_tok": None, "target_experts_per_tok": None}
    _, _, logged = train(build(**fixed), tmp_path, balance=ExpertBalanceCallback())
    for row in logged:
        assert row["mean_experts_per_tok"] == 3 and not any(key.startswith("share_of_tokens") for key in row)


SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


def jetmoe():
    return transformers.JetMoeConfig(
        vocab_size=97, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_key_value_heads=2,
        kv_channels=16, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip


def llama4():
    return transformers.Llama4TextConfig(
        **SMALL, intermediate_size_mlp=24, head_dim=16, num_local_experts=4, num_experts_per_tok=2,
        interleave_moe_layer_step=1, attention_chunk_size=64,
    )  # fmt: skip


def switch():
    return transformers.SwitchTransformersConfig(
        vocab_size=97, d_model=32, d_kv=16, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=4,
        num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, decoder_start_token_id=0,
    )  # fmt: skip


def gemma4():
    return transformers.Gemma4TextConfig(
        **SMALL, head_dim=16, global_head_dim=16, hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=4,
        top_k_experts=2, moe_intermediate_size=16, num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip


# 5.17's routers of these families return other things; there they are named as not reporting, or not counted.
from_5_23 = pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="needs transformers 5.23")
# By name: the configuration, its model class, experts per token, and the routers; JetMoe's attention has its own.
OTHERS = {
    "JetMoe": (jetmoe, "JetMoeForCausalLM", 2, 4),
    "Llama 4": (llama4, "Llama4ForCausalLM", 2, 2),
    "Switch": (switch, "SwitchTransformersForConditionalGeneration", 1, 4),
    "Gemma 4": (gemma4, "Gemma4ForCausalLM", 2, 2),
}


@from_5_23
@pytest.mark.parametrize("name", OTHERS)
def test_routers_that_report_their_choice_otherwise(tmp_path, name):
    """Witness: the k best of the logits that transformers itself records."""
    make_config, model_class, k, num_routers = OTHERS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(make_config())
    layers = find_moe_layers(model)
    assert len(layers) == num_routers
    seen = [[] for _ in layers]
    for rows, layer in zip(seen, layers, strict=True):
        layer.router.register_forward_hook(
            lambda _m, _a, out, rows=rows, place=layer.logits_place: rows.append(out[place].flatten(0, -2))
        )
    _, figures, logged = train(model, tmp_path, figures=True, padded=False)
    for number, rows in enumerate(seen):
        logits = torch.cat(rows[-WINDOW:]).float()  # Of the last log line.
        load = torch.bincount(logits.topk(k).indices.flatten(), minlength=4).tolist()
        assert figures.tokens_per_expert[number] == load
        shares = logits if name == "Gemma 4" else logits.softmax(-1)
        entropy = torch.special.entr(shares).sum(-1).mean().item()
        assert logged[-1][f"router_entropy_layer_{number}"] == pytest.approx(entropy, abs=1e-5)
    assert logged[-1]["mean_experts_per_tok"] == k


@from_5_23
def test_routers_that_do_not_report_their_choice_are_named_once(tmp_path, caplog):
    type(callback_module.logger).warning_once.cache_clear()
    torch.manual_seed(0)
    config = transformers.DbrxConfig(
        d_model=32, n_heads=2, n_layers=2, max_seq_len=64, vocab_size=97,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    )  # fmt: skip
    _, _, logged = train(transformers.DbrxForCausalLM(config), tmp_path, figures=True)
    assert all(row["tokens_per_second"] > 0 and "load_imbalance" not in row for row in logged)
    named = [
        record.getMessage() for record in caplog.records if "does not return which experts" in record.getMessage()
    ]
    assert named == ["DbrxRouter does not return which experts it chooses; the log has no figures of it"]


def test_any_other_moe_has_figures_too(tmp_path):
    """Mixtral's, alone and beside a callback that counts them too: padding is left out."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    _, figures, logged = train(MixtralForCausalLM(config), tmp_path, figures=True)
    for row in logged:
        assert row["mean_experts_per_tok"] == 2 and 1 <= row["load_imbalance"] <= 2
        assert 0 < row["router_entropy_layer_1"] <= math.log(4) + 1e-6 and row["tokens_per_second"] > 0
        assert "router_bias_range" not in row
    num_tokens = WINDOW * BATCH * (LENGTH - NUM_PADDING)
    assert [sum(load) for load in figures.tokens_per_expert] == [2 * num_tokens] * 2
    torch.manual_seed(0)
    balance = ExpertBalanceCallback(seq_aux_loss_coef=0.1)
    _, beside, _ = train(MixtralForCausalLM(config), tmp_path, balance=balance, figures=True)
    assert [sum(load) for load in beside.tokens_per_expert] == [2 * num_tokens] * 2
    assert [sum(load) for load in balance.history[-1].tokens_per_expert] == [2 * num_tokens] * 2


def test_what_was_not_measured_is_absent(tmp_path):
    """Without a pass through the routers in a window, no figure of them, rather than 0."""
    windows = [RouterWindow.of(LayerCounts(torch.zeros(8).long(), torch.zeros(4).long(), 0.0, 0), layer)
               for layer in find_moe_layers(build())]  # fmt: skip
    assert router_figures(windows) == {}
