"""What a fixed number of experts per token changes in a model that was trained with a dynamic one.

llama.cpp, vLLM and SGLang take one number for the whole model. `deepseek-moe export --fixed-experts` prints this
measurement beside the file it writes, so that the price of the export is known before it is served.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

PROBE = (
    "Once upon a time there was a fox who lived at the edge of a wood. Every morning he went down to the river to "
    "drink, and every evening he counted the stars. The patient was given 250 mg twice a day for 14 days; blood "
    "pressure fell and no adverse events were seen. def add(a, b): return a + b"
)


@dataclass(frozen=True)
class FixedExpertsDifference:
    """How far a model at a fixed number of experts is from itself.

    Args:
        num_experts: The fixed number.
        num_tokens: Tokens compared.
        mean_kl: Mean over tokens of KL(dynamic || fixed), in nats.
        argmax_agreement: Share of tokens whose likeliest next token is the same.
        max_logit_difference: Largest difference of any logit.
    """

    num_experts: int
    num_tokens: int
    mean_kl: float
    argmax_agreement: float
    max_logit_difference: float

    def __str__(self) -> str:
        return (
            f"at {self.num_experts} experts per token instead of a dynamic number: mean KL {self.mean_kl:.2g} nats a "
            f"token, same likeliest next token on {self.argmax_agreement:.1%} of {self.num_tokens} tokens, largest "
            f"logit difference {self.max_logit_difference:.2g}"
        )


@torch.no_grad()
def measure_fixed_experts(model_path: str | Path, num_experts: int, text: str = PROBE) -> FixedExpertsDifference:
    """Return how far the model at a fixed number of experts per token is from the model as trained.

    Args:
        model_path: A checkpoint of ours with its tokenizer.
        num_experts: The fixed number.
        text: What the two are compared on; cut at the model's context.
    """
    from deepseek_records.loading import load_model, load_tokenizer, resolve_checkpoint
    from modeling_deepseek import DeepseekConfig

    model_path = resolve_checkpoint(model_path)
    fixed = DeepseekConfig.from_pretrained(
        model_path,
        num_experts_per_tok=num_experts,
        min_experts_per_tok=None,
        target_experts_per_tok=None,
        expert_top_p=None,
    )
    ids = load_tokenizer(model_path)(text, return_tensors="pt").input_ids[:, : fixed.max_position_embeddings]
    logits = load_model(model_path, dtype=torch.float32)(ids).logits[0]
    with _quiet():  # the state of the controller that a fixed number has no use for
        others = load_model(model_path, dtype=torch.float32, config=fixed)(ids).logits[0]
    logps, other_logps = logits.log_softmax(-1), others.log_softmax(-1)
    return FixedExpertsDifference(
        num_experts=num_experts,
        num_tokens=ids.shape[1],
        mean_kl=float((logps.exp() * (logps - other_logps)).sum(-1).mean()),
        argmax_agreement=float((logits.argmax(-1) == others.argmax(-1)).float().mean()),
        max_logit_difference=float((logits - others).abs().max()),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting keys that are left over on purpose."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
