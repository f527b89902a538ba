"""Measures what router replay mends: how far log-probs of sampled tokens are from those of a full forward pass.

    python dev/router_replay.py MODEL --prompts 32 --tokens 48

A model in bf16 samples completions; their log-probs by generation are compared with those of one pass over the whole
text, once with live routers and once with the generation's experts replayed. The cost is CPU time of generation and of
a training pass, with and without, interleaved.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from deepseek_records.loading import load_model, load_tokenizer
from deepseek_training.balance.router_replay import RouterReplay
from deepseek_training.data.texts import load_texts


def sample(model: PreTrainedModel, ids: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts and completions [B, P + T], and the completions' log-probs [B, T] as generation has them.

    Args:
        model: Samples.
        ids: [B, P] prompts.
        num_tokens: T.
    """
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=True, top_k=0,
        eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    chosen = output.sequences[:, ids.shape[1] :, None]
    return output.sequences, torch.stack(output.scores, 1).log_softmax(-1).gather(-1, chosen).squeeze(-1)


def score(model: nn.Module, sequences: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return log-probs [B, T] of the last tokens by one forward pass.

    Args:
        model: In any mode.
        sequences: [B, P + T].
        num_tokens: T.
    """
    logits = model(sequences, attention_mask=torch.ones_like(sequences), use_cache=False).logits
    logprobs = logits[:, -num_tokens - 1 : -1].float().log_softmax(-1)
    return logprobs.gather(-1, sequences[:, -num_tokens:, None]).squeeze(-1)


def _seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, experts_implementation="grouped_mm").to(torch.bfloat16).train()
    text = tokenizer("\n".join(load_texts("books", "validation")))["input_ids"]
    starts = torch.randint(0, len(text) - args.prompt_tokens, (args.prompts,)).tolist()
    ids = torch.tensor([text[start : start + args.prompt_tokens] for start in starts])
    replay = RouterReplay(model).attach()
    sequences, generated = sample(model, ids, args.tokens)
    rows = {"replayed": score(model, sequences, args.tokens).detach()}
    print(f"share of tokens replayed {replay.take_share():.4f}")
    replay.detach()
    rows["live"] = score(model, sequences, args.tokens).detach()
    for name, logprobs in rows.items():
        gaps = (logprobs - generated).abs().flatten()
        print(f"{name}: worst ratio {gaps.max().exp():.3f}, |delta logp| p99.9 {gaps.quantile(0.999):.4f}")
    works: dict[str, Callable[[], object]] = {
        "generation": lambda: sample(model, ids, args.tokens),
        "training pass": lambda: score(model, sequences, args.tokens).mean().backward(),
    }
    seconds: dict[tuple[str, bool], list[float]] = {(name, on): [] for name in works for on in (False, True)}
    for turn in range(args.rounds):
        for is_on in (False, True) if turn % 2 else (True, False):
            if is_on:
                replay.attach()
            for name, work in works.items():
                seconds[name, is_on].append(_seconds(work))
            replay.detach()
    for name in works:
        ratios = [on / off for on, off in zip(seconds[name, True], seconds[name, False], strict=True)]
        print(f"{name}: replay on / off {statistics.median(ratios):.3f} over {args.rounds} rounds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
