"""The number of experts per token while a model trains on real text, through the stock Trainer."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from deepseek_training.balance.callback import ExpertBalanceCallback
from deepseek_training.data.texts import load_texts

# Steps until the mean of any SPAN steps stays within 0.1 of the target, and how many are watched after that.
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

# Steps until the mean of any SPAN steps stays within 0.1 of the target, and how many are watched after that.
SETTLING, WATCHED, SPAN = 40, 60, 10


def byte_rows(num_rows, length):
    """Rows of bytes of the embedded books, as token ids."""
    text = " ".join(load_texts("books", "train")[:40]).encode()[: num_rows * length]
    return [{"input_ids": row, "labels": row} for row in (torch.tensor(list(text)) + 3).view(num_rows, length)]


@pytest.mark.slow
@pytest.mark.parametrize("first_p", [None, 0.05], ids=["good start", "bad start"])
def test_the_mean_is_held_on_real_text(tmp_path, first_p):
    """8 to 12 of 32 experts at a mean of 10, in each layer, on bytes of the embedded books."""
    torch.manual_seed(0)
    config = DeepseekConfig.from_preset(
        "debug", vocab_size=259, n_routed_experts=32, moe_intermediate_size=16, num_experts_per_tok=12,
        min_experts_per_tok=8, target_experts_per_tok=10.0, expert_top_p=first_p, router_bias_update_speed=0.01,
    )  # fmt: skip
    model, balance = DeepseekForCausalLM(config), ExpertBalanceCallback()
    model.set_experts_implementation("fused_moe")
    num_steps = SETTLING + WATCHED
    arguments = TrainingArguments(
        tmp_path, max_steps=num_steps, per_device_train_batch_size=8, learning_rate=3e-3, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=byte_rows(8 * num_steps, 64), callbacks=[balance]).train()
    for layer in range(2):
        means = [record.figures[f"mean_experts_per_tok_layer_{layer}"] for record in balance.history]
        assert len(means) == num_steps and (first_p is None or means[0] == 8), "p = 0.05 keeps the least"
        late = means[SETTLING:]
        spans = [sum(late[i : i + SPAN]) / SPAN for i in range(len(late) - SPAN + 1)]
        print(f"layer {layer}: mean of {SPAN} steps {min(spans):.3f} to {max(spans):.3f}")
        assert max(abs(mean - 10) for mean in spans) < 0.1
    shares = [balance.history[-1].figures[f"share_of_tokens_with_{count}_experts"] for count in range(8, 13)]
    assert sum(shares) == pytest.approx(1)
    mean = sum(count * share for count, share in zip(range(8, 13), shares, strict=True))
    assert mean == pytest.approx(balance.history[-1].figures["mean_experts_per_tok"])
    assert sum(share > 0.05 for share in shares) >= 3, "tokens differ"
