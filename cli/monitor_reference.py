"""``deepseek-moe monitor reference``: answers texts as the server would, and keeps what the routers chose."""

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options.

    Args:
        parser: The command's parser.
    """
    parser.add_argument("model", metavar="MODEL", help="a local folder or a Hub id")
    parser.add_argument(
        "--data", required=True, metavar="TEXTS", help="what is asked: a file or folder of texts, or an embedded name"
    )
    parser.add_argument("--output", dest="file", metavar="FILE", help="else drift_reference.npz in MODEL")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of each text, at most")
    parser.add_argument("--max-tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--limit", type=int, default=4000, help="texts, evenly drawn")
    parser.add_argument("--at-least", type=int, default=2000, help="texts; with fewer, windows are small and say less")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that lies in the checkpoint")


def run(args: argparse.Namespace) -> int:
    """Answer the texts and write the reference.

    Args:
        args: The parsed options.

    Returns:
        0.
    """
    from deepseek_records.loading import resolve_checkpoint
    from deepseek_serving.monitoring.drift_reference import FILE_NAME

    if args.file is None and not Path(resolve_checkpoint(args.model)).is_dir():
        raise ValueError("--output: got none for a model of the Hub, expected a file to write")
    path = Path(args.file) if args.file else Path(resolve_checkpoint(args.model)) / FILE_NAME
    if not path.name.endswith(".npz"):
        raise ValueError(f"--output: got {path}, expected a name that ends in .npz")
    table = _answer(args)
    table.save(path)
    print(f"{path}: what {len(table)} requests left behind at {', '.join(table.layers) or 'no layer of experts'}")
    return 0


def _answer(args: argparse.Namespace) -> Any:
    """Put the texts to the model as the server would, and return the counts."""
    import numpy as np
    from tqdm import tqdm

    from deepseek_eval.model_loading import find_max_length
    from deepseek_records.loading import check_vocabulary, load_model, load_tokenizer
    from deepseek_records.user_text import encode, protect
    from deepseek_serving.monitoring.drift_reference import answer_all
    from deepseek_serving.openai_endpoint.engine import Engine, Limits
    from deepseek_training.data.texts import load_texts

    texts = load_texts(args.data, "all")
    if len(texts) < args.at_least:
        raise ValueError(
            f"--data: got {len(texts)} texts, expected at least {args.at_least}; --at-least {len(texts)} takes them"
        )
    chosen = np.random.default_rng(0).permutation(len(texts))[: args.limit]
    tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    model = load_model(args.model, trust_remote_code=args.trust_remote_code, attn_implementation="sdpa")
    check_vocabulary(model, tokenizer)
    encoded = [encode(protect(texts[place], tokenizer), tokenizer, add_special_tokens=True) for place in chosen]
    prompts = [ids[: args.prompt_tokens] for ids in encoded if ids]
    limits = Limits(context=find_max_length(model.config, tokenizer), max_tokens=args.max_tokens)
    with Engine(model, limits) as engine, tqdm(total=len(prompts), unit="text", leave=False) as bar:
        return answer_all(engine, prompts, args.max_tokens, bar.update)
