"""A real causal language model that knows one thing: how likely each token is, whatever came before.

All weights are zero but the embeddings, the norm and the head, so every position has the same hidden state and the
head's rows are the logits. What such a model scores follows by hand.
"""

import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

REFERENCE = Path(__file__).resolve().parent / "reference"


def make_unigram_model(folder: Path, logits: dict[str, float]) -> Path:
    """Write a checkpoint whose logits are 0 but for the tokens named.

    Args:
        folder: Where to write.
        logits: By text, which must be one token.
    """
    shutil.copytree(REFERENCE / "llama", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, tie_word_embeddings=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "embed_tokens" in name or name == "model.norm.weight" else 0.0)
        for text, logit in logits.items():
            (token,) = tokenizer.encode(text, add_special_tokens=False)
            # The norm of a constant vector is the vector of ones.
            model.lm_head.weight[token] = logit / model.config.hidden_size
    model.save_pretrained(folder)
    return folder
