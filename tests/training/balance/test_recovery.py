"""A router collapsed by its initialization: stock transformers stays collapsed, ours recovers, on the same text."""

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Trainer, TrainingArguments

from deepseek_training.balance.callback import ExpertBalanceCallback
from deepseek_training.data.texts import load_texts
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

NUM_STEPS = 150


def byte_rows(num_rows, length):
    """Rows of bytes of the embedded books, as token ids."""
    text = " ".join(load_texts("books", "train")[:40]).encode()[: num_rows * length]
    ids = torch.tensor(list(text[: num_rows * length])) + 3
    return [{"input_ids": row, "labels": row} for row in ids.view(num_rows, length)]


@torch.no_grad()
def collapse(model):
    """Give every token a common direction and let 3 of 8 experts read it."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    model.model.embed_tokens.weight += 0.3 * direction
    for layer in model.model.layers[1:]:
        layer.mlp.gate.weight[:3] += 0.5 * direction


@torch.no_grad()
def load_imbalance(model, rows):
    """max / mean of the experts' load in the worst layer, counted by hooks: the same way for both models."""
    loads = []

    def count(_module, _inputs, output):
        loads.append(torch.bincount(output[2].flatten(), minlength=8).float())

    hooks = [layer.mlp.gate.register_forward_hook(count) for layer in model.model.layers[1:]]
    model.eval()(torch.stack([row["input_ids"] for row in rows]))
    for hook in hooks:
        hook.remove()
    return max((load.max() / load.mean()).item() for load in loads)


def train(model, rows, folder, callbacks):
    arguments = TrainingArguments(
        folder, max_steps=NUM_STEPS, per_device_train_batch_size=8, learning_rate=1e-3, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no", logging_steps=50,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()


@pytest.mark.slow
def test_a_collapsed_router_recovers_and_stocks_does_not(tmp_path):
    rows = byte_rows(648, 64)
    train_rows, held_out = rows[:600], rows[600:]
    base = DeepseekConfig.from_preset(
        "debug", vocab_size=259, min_experts_per_tok=None, target_experts_per_tok=None, num_experts_per_tok=3,
        router_bias_update_speed=0.02, seq_aux_loss_coef=1e-3,
    )  # fmt: skip
    shared = {key: value for key, value in base.to_dict().items() if key in DeepseekV3Config().to_dict()}
    torch.manual_seed(0)
    stock = DeepseekV3ForCausalLM(DeepseekV3Config(**{**shared, "model_type": "deepseek_v3"}))
    collapse(stock)
    ours = DeepseekForCausalLM(base)
    ours.load_state_dict(stock.state_dict())
    before = load_imbalance(stock, held_out)
    assert load_imbalance(ours, held_out) == before > 2.5, "8 experts on 3: at most 2.67"
    train(stock, train_rows, tmp_path / "stock", [])
    train(ours, train_rows, tmp_path / "ours", [ExpertBalanceCallback()])
    after_stock, after_ours = load_imbalance(stock, held_out), load_imbalance(ours, held_out)
    print(f"load imbalance on held-out text: {before:.2f} -> stock {after_stock:.2f}, ours {after_ours:.2f}")
    assert after_stock > 2.0
    assert after_ours < 1.5
