"""``deepseek-moe generate``: a quick look at what a model writes, token by token.

Uses transformers' own `generate` and `TextStreamer`; any causal LM works.
"""

import argparse
import sys
from typing import Any

HELP = "Continue a prompt with any causal language model, streaming."
EXAMPLES = """
  deepseek-moe generate runs/demo/align/model --prompt "Once upon a time"
  deepseek-moe generate runs/demo/pretrain/model --prompt "The King" --temperature 0 --max-new-tokens 40
  deepseek-moe generate runs/mtp/model --prompt "The King" --temperature 0 --use-mtp
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help="a local folder or a Hub id")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument(
        "--special-tokens",
        action="store_true",
        help="read text of the prompt that spells a special token as that token; otherwise it stays text",
    )
    parser.add_argument("--max-new-tokens", type=int, default=100, help="at most this many tokens are written")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.95, help="share of probability to sample from")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    parser.add_argument(
        "--use-mtp",
        action="store_true",
        help="draft with the checkpoint's multi-token prediction layers, and say how many drafts were accepted",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that lies in the checkpoint")


def run(args: argparse.Namespace) -> int:
    """Load, check the prompt's length, and stream."""
    _check(args)
    import torch
    from transformers import TextStreamer, set_seed

    from deepseek_eval.model_loading import find_max_length
    from deepseek_records.loading import check_vocabulary, load_model, load_tokenizer
    from deepseek_records.user_text import encode, protect
    from modeling_deepseek.draft_acceptance import count_drafts

    tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    model = load_model(args.model, trust_remote_code=args.trust_remote_code)
    check_vocabulary(model, tokenizer)
    prompt = args.prompt if args.special_tokens else protect(args.prompt, tokenizer)
    input_ids = torch.tensor([encode(prompt, tokenizer, add_special_tokens=True)], dtype=torch.long)
    num_prompt_tokens = input_ids.shape[1]
    context = find_max_length(model.config, tokenizer)
    if num_prompt_tokens == 0:
        raise ValueError("--prompt: got an empty text, expected at least one token")
    if num_prompt_tokens >= context:
        raise ValueError(
            f"--prompt: {num_prompt_tokens} tokens do not fit the model's context of {context}; pass a shorter prompt"
        )
    set_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
    options = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "max_new_tokens": min(args.max_new_tokens, context - num_prompt_tokens),
        "streamer": TextStreamer(tokenizer, skip_special_tokens=True),
        **(sampling if args.temperature > 0 else {"do_sample": False}),
    }
    with torch.inference_mode(), count_drafts(model) as drafts:
        _draft(model, **options) if args.use_mtp else model.generate(**options)
    if args.use_mtp:
        print(f"multi-token prediction: {drafts}", file=sys.stderr)
    return 0


def _draft(model: Any, **options: Any) -> None:
    """Generate with drafts; a checkpoint without the layers gives one line, where transformers fails in its depths."""
    config = model.config.get_text_config()
    lacking = None
    if not hasattr(config, "num_mtp_layers") or not config.num_mtp_layers:
        lacking = "the model's num_nextn_predict_layers is 0"
    else:
        try:
            model.generate(use_mtp=True, **options)
        except RuntimeError as error:
            if "MtpModel weights are missing" not in str(error):
                raise
            lacking = "the checkpoint holds no multi-token prediction layers"
    if lacking:
        raise ValueError(f"--use-mtp: {lacking}, expected a model trained with mtp_loss_coef above 0")


def _check(args: argparse.Namespace) -> None:
    if any("\ud800" <= letter <= "\udfff" for letter in args.prompt):  # How Python reads such bytes.
        raise ValueError("--prompt: got bytes that are not UTF-8, expected text")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed: got {args.seed}, expected 0 to 2**32 - 1")
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens: got {args.max_new_tokens}, expected at least 1")
    if not 0 <= args.temperature < float("inf"):
        raise ValueError(f"--temperature: got {args.temperature}, expected 0 or more")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p: got {args.top_p}, expected above 0 and at most 1")
