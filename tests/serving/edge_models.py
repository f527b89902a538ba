"""Tiny models with large weights, whose greedy text depends on every part, and a tokenizer with real merges."""

import functools

import numpy as np
import torch
from saved_families import BASE, FAMILIES
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from deepseek_training.data.texts import load_texts
from deepseek_training.data.tokenizer import train_tokenizer
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

VOCABULARY = 400
SHAPE = {
    **{"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32},
    **{"num_hidden_layers": 2, "first_k_dense_replace": 1, "initializer_range": 0.15, "max_position_embeddings": 256},
}
FIXED = {"num_experts_per_tok": 3, "min_experts_per_tok": None}
ROUTERS = {
    "sigmoid": {**FIXED, "n_group": 2, "topk_group": 1, "q_lora_rank": 24, "routed_scaling_factor": 2.5},
    "softmax": {**FIXED, "scoring_func": "softmax", "norm_type": "layernorm"},
    "router_key_dim": {**FIXED, "scoring_func": "softmax", "router_key_dim": 8},
    "dynamic k": {"num_experts_per_tok": 4, "min_experts_per_tok": 1, "expert_top_p": 0.7},
    "fixed k, all experts weighed": {**FIXED, "scoring_func": "softmax", "norm_topk_prob": False},
}
PROMPTS = (
    "Once upon a time",
    "The patient was given 250 mg",
    "def add(a, b):\n    return a + b",
    "in 1999 the river rose",
    "It's what they'd've said",
    "   three spaces",
    "tabs\tand\n\nlines\n",
    "na\u00efve \u0153uvre",
    "\u041c\u043e\u0441\u043a\u0432\u0430",
    "\u4eca\u65e5\u306f",
    "x=1;y=2",
    "ALL CAPS",
    "http://example.org/a?b=c",
    "a fox and a crow",
    "1,234.89",
    "0",
    " ",
    "quotes \u201clike these\u201d",
    "e\u0301 is not \u00e9",
    "the the the the",
)


@functools.cache
def make_tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(
        [text[:2000] for text in load_texts("books", "validation")[:20]] + [*PROMPTS] * 4, VOCABULARY
    )


def make_ours(**settings) -> PreTrainedModel:
    torch.manual_seed(3)
    model = DeepseekForCausalLM(DeepseekConfig.from_preset("debug", **{**SHAPE, **settings})).eval()
    for name, tensor in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(torch.randn_like(tensor) * 0.1)
    return model


def make_other(family: str) -> PreTrainedModel:
    config_class, settings = FAMILIES[family]
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 256}
    model = AutoModelForCausalLM.from_config(config_class(**{**BASE, **settings, **sizes})).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def differences(decoder, model: PreTrainedModel, shapes: tuple[tuple[int, int, int], ...]) -> list[float]:
    """Largest logit differences for (batch, cached, new) lengths, the longest row full, the others padded left."""
    found = []
    for batch, num_past, num_new in shapes:
        ids = torch.randint(3, VOCABULARY, (batch, num_past + num_new))
        mask = torch.ones_like(ids)
        for row in range(1, batch):
            mask[row, : min(row, num_past)] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        want = model(ids, attention_mask=mask, position_ids=positions).logits[:, num_past:].numpy()
        past = decoder.empty_past(batch)
        if num_past:
            _, _, past = decoder.step(ids[:, :num_past].numpy(), mask[:, :num_past].numpy(), past)
        got, _, past = decoder.step(ids[:, num_past:].numpy(), mask.numpy(), past)
        assert past[0].shape[2] == num_past + num_new
        found.append(float(np.abs(got - want).max()))
    return found


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: list[int], num_new: int) -> list[int]:
    """What transformers writes; nothing stops it, so that every prompt is compared over as many tokens."""
    options = {"max_new_tokens": num_new, "min_new_tokens": num_new, "do_sample": False, "eos_token_id": None}
    return model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
