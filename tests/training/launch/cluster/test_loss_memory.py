"""The bytes per logit that the plan counts, against what `Trainer` allocates on its way through transformers' loss."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from deepseek_training.launch.cluster.layout import Layout
from deepseek_training.launch.cluster.memory import estimate_memory
from deepseek_training.launch.cluster.shape import read_shape

VOCABULARY = 8192
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
)


def most_bytes(step):
    """The largest sum of living allocations while `step` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def step_bytes(length, folder, *, dtype, is_autocast):
    model = LlamaForCausalLM(CONFIG).to(dtype)
    ids = torch.arange(length).view(1, length)
    settings = TrainingArguments(folder, use_cpu=True, bf16=is_autocast, report_to=[])
    trainer = Trainer(model, settings, train_dataset=[{"input_ids": ids[0], "labels": ids[0]}])
    trainer.model_wrapped = trainer.accelerator.prepare(model)

    def step():
        trainer.training_step(trainer.model_wrapped, {"input_ids": ids, "labels": ids}, torch.tensor(length))

    step()
    return most_bytes(step)


@pytest.mark.parametrize(
    ("dtype", "is_autocast"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
    ids=["fp32", "bf16", "autocast"],
)
def test_the_loss_takes_what_the_plan_counts(dtype, is_autocast, tmp_path):
    """Of two lengths the difference: neither weights nor their gradients are in it."""
    short, long = (step_bytes(n, str(tmp_path), dtype=dtype, is_autocast=is_autocast) for n in (128, 384))
    per_logit = (long - short) / (256 * VOCABULARY)
    shape = read_shape(CONFIG, "small")
    counted = [estimate_memory(shape, Layout(data=1, zero=0, batch=1, length=n)).logits for n in (128, 384)]
    assert per_logit == pytest.approx((counted[1] - counted[0]) / (256 * VOCABULARY), rel=0.04)
