"""Measures what router replay mends: how far log-probs of sampled tokens are from those of a full forward pass.

    OMP_NUM_THREADS=1 python dev/router_replay.py MODEL [--float32-head]

A model in bf16 samples completions; their log-probs by generation are compared with those of one pass over the whole
text, once with live routers and once with the experts of the generation replayed, over several seeds. A dense model
shows what rounding alone does. The cost is CPU time of a generation and of a training step with replay over that
without, on two copies of the model, interleaved.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from deepseek_records.loading import load_model, load_tokenizer
from deepseek_records.statistics import mean_with_error
from deepseek_training.balance.router_replay import RouterReplay
from deepseek_training.data.texts import load_texts
from modeling_deepseek.families import find_moe_layers


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
    logprobs = [one.float().log_softmax(-1) for one in output.scores]
    return output.sequences, torch.stack(logprobs, 1).gather(-1, chosen).squeeze(-1)


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


def tails(model: PreTrainedModel, prompts: torch.Tensor, num_tokens: int) -> dict[str, tuple[float, float]]:
    """Return the worst ratio and the 99.9th percentile of |delta logp|, with live routers and with replayed experts.

    Args:
        model: Samples; without routed experts there is one row only.
        prompts: [B, P].
        num_tokens: Of each completion.
    """
    replay = RouterReplay(model).attach() if find_moe_layers(model) else None
    sequences, generated = sample(model, prompts, num_tokens)
    logprobs = {}
    with torch.no_grad():
        if replay is not None:
            logprobs["replayed"] = torch.cat([score(model, rows, num_tokens) for rows in sequences.split(32)])
            replay.detach()
        logprobs["live"] = torch.cat([score(model, rows, num_tokens) for rows in sequences.split(32)])
    gaps = {name: (one - generated).abs().flatten() for name, one in logprobs.items()}
    return {name: (float(gap.max().exp()), float(gap.quantile(0.999))) for name, gap in gaps.items()}


def cost_ratios(model: PreTrainedModel, prompts: torch.Tensor, num_pairs: int) -> dict[str, list[float]]:
    """Return CPU seconds with replay over those without, pair by pair: of a generation and of a training step.

    Args:
        model: Samples, and is trained.
        prompts: [B, P].
        num_pairs: Of each.
    """
    copies = {True: model, False: copy.deepcopy(model)}
    replay = RouterReplay(model).attach()
    sequences, _ = sample(model, prompts, 232)
    works: dict[str, Callable[[PreTrainedModel], Callable[[], float]]] = {
        "generation of 48 tokens": lambda one: _timed(lambda: sample(one, prompts, 48)),
        f"training step of {sequences.numel()} tokens": lambda one: _stepper(one, sequences, 232),
        "training step of 256 tokens": lambda one: _stepper(one, sequences[:4, :64], 40),
    }
    ratios = {}
    for name, make in list(works.items())[::-1]:  # a generation puts new records in the place of the old
        steps = {is_on: make(one) for is_on, one in copies.items()}
        ratios[name] = []
        for turn in range(num_pairs + 2):
            seconds = {is_on: steps[is_on]() for is_on in ((True, False) if turn % 2 else (False, True))}
            ratios[name].append(seconds[True] / seconds[False])
        del ratios[name][:2]
    print(f"share of tokens replayed {replay.take_share():.4f}")
    replay.detach()
    return ratios


def _timed(work: Callable[[], object]) -> Callable[[], float]:
    def timed() -> float:
        began = time.process_time()
        work()
        return time.process_time() - began

    return timed


def _stepper(model: nn.Module, sequences: torch.Tensor, num_tokens: int) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> None:
        (-score(model, sequences, num_tokens).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return _timed(step)


def _compute_head_in_float32(model: PreTrainedModel) -> None:
    """As `cast_lm_head_to_fp32` of TRL's GRPO does."""
    model.lm_head = copy.deepcopy(model.lm_head).float()
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].float(),))


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=160)
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=30, help="steps that are timed with replay and without; 0: none")
    parser.add_argument("--float32-head", action="store_true", help="compute the logits in float32")
    args = parser.parse_args()
    logging.set_verbosity_error()
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model).to(torch.bfloat16).train()
    if find_moe_layers(model):
        model.set_experts_implementation("grouped_mm")
    if args.float32_head:
        _compute_head_in_float32(model)
    text = tokenizer("\n".join(load_texts("books", "validation")))["input_ids"]
    found = []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        starts = torch.randint(0, len(text) - args.prompt_tokens, (args.prompts,)).tolist()
        prompts = torch.tensor([text[start : start + args.prompt_tokens] for start in starts])
        found.append(tails(model, prompts, args.tokens))
        print(seed, found[-1], flush=True)
    for name in found[0]:
        worst, error = max(row[name][0] for row in found), mean_with_error([row[name][1] for row in found])
        print(f"{name}: worst ratio {worst:.3f}, |delta logp| p99.9 {error[0]:.4f} +- {error[1] or 0:.4f}")
    if "replayed" in found[0]:
        mean, error = mean_with_error([row["live"][1] / row["replayed"][1] for row in found])
        print(f"p99.9 cut {mean:.2f} +- {error or 0:.2f} times")
    for dtype in (torch.float32, torch.bfloat16) if args.pairs else ():
        model = load_model(args.model, experts_implementation="fused_moe").to(dtype).train()
        for name, ratios in cost_ratios(model, prompts[:8], args.pairs).items():
            mean, error = mean_with_error(ratios)
            print(f"{dtype}: a {name} with replay costs {mean:.4f} +- {error:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
