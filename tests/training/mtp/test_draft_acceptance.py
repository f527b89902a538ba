"""Slow: what training the prediction layers is worth in accepted drafts, against keeping them as they were.

A stock DeepSeek-V3 is trained on books with its prediction layer, then on medicine, with the layer kept or trained.
`pytest tests/training/mtp/test_draft_acceptance.py -m slow -s` prints the table.
"""

import numpy as np
import pytest
import torch
from mtp_checkpoints import write_v3
from transformers import AutoModelForCausalLM, set_seed
from transformers.modeling_layers import MtpModel

from deepseek_records.kept_mtp import keep_mtp
from deepseek_training.data.packing import encode_documents
from deepseek_training.data.texts import load_texts
from deepseek_training.data.tokenizer import train_tokenizer
from deepseek_training.mtp import train_mtp
from modeling_deepseek.draft_acceptance import count_drafts

pytestmark = pytest.mark.skipif(
    not hasattr(MtpModel, "forward_layer"), reason="older transformers builds the layers for drafting alone"
)
WIDE = {
    "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 4, "qk_nope_head_dim": 32, "v_head_dim": 32, "kv_lora_rank": 64, "q_lora_rank": 64,
    "n_group": 1, "vocab_size": 1000,
}  # fmt: skip


def load(path, *, trains):
    model = AutoModelForCausalLM.from_pretrained(path)
    if trains:
        return train_mtp(model)
    assert keep_mtp(model)
    return model


def learn(model, tokens, steps):
    """AdamW on rows of 128 tokens, 8 a step."""
    set_seed(0)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - 128, (8, 1))
        rows = tokens[starts + torch.arange(128)]
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    return model.eval()


def accepted(path, prompts):
    """Drafts accepted and drafted, greedy, 40 tokens each; the text is that without drafts."""
    model = load(path, trains=False).eval()
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    with count_drafts(model) as drafts:
        drafted = [model.generate(prompt, use_mtp=True, **options) for prompt in prompts]
    plain = [model.generate(prompt, **options) for prompt in prompts]
    return drafts.num_accepted, drafts.num_drafted, sum(map(torch.equal, drafted, plain))


@pytest.mark.slow
def test_trained_layers_draft_better_after_fine_tuning(tmp_path):
    tokenizer = train_tokenizer(load_texts("books") + load_texts("medicine"), 1000)
    books, medicine = (
        torch.from_numpy(np.concatenate(encode_documents(load_texts(name), tokenizer))).long()
        for name in ("books", "medicine")
    )
    held_out = encode_documents(load_texts("medicine", "validation")[:32], tokenizer)
    prompts = [torch.from_numpy(row[:16]).long()[None] for row in held_out]
    write_v3(tmp_path / "new", 1, **WIDE)
    learn(load(tmp_path / "new", trains=True), books, 300).save_pretrained(tmp_path / "base")
    rates = {"base": accepted(tmp_path / "base", prompts)}
    for name in ("kept", "trained"):
        learn(load(tmp_path / "base", trains=name == "trained"), medicine, 300).save_pretrained(tmp_path / name)
        rates[name] = accepted(tmp_path / name, prompts)
    for name, (num_accepted, num_drafted, same) in rates.items():
        share = num_accepted / num_drafted
        print(f"{name}: {num_accepted} of {num_drafted} drafts accepted, {share:.0%}; same text {same}")
    assert rates["trained"][0] / rates["trained"][1] > rates["kept"][0] / rates["kept"][1] + 0.05
