"""``deepseek-moe monitor evaluate``: scores a served model again and again, on tasks of any kind, and tells a fall."""

import argparse
import time
from pathlib import Path

from deepseek_eval.tasks.catalogue import TASKS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options.

    Args:
        parser: The command's parser.
    """
    text_tasks = ", ".join(sorted(name for name, task in TASKS.items() if task.kind != "media"))
    parser.add_argument("url", metavar="URL", help="the server, for example http://127.0.0.1:8000")
    parser.add_argument("--requests", metavar="DIR", required=True, help="the server's; results go there")
    parser.add_argument("--tasks", default="humaneval", metavar="NAMES", help=f"comma-separated, of {text_tasks}")
    parser.add_argument(
        "--tokenizer", metavar="MODEL", help="the served model's folder or Hub id, for tasks that compare given words"
    )
    parser.add_argument("--limit", metavar="N", help="first items of a task, or task=N pairs (all without it)")
    parser.add_argument("--data", metavar="PATH", help="own data, as for evaluate, such as crows_pairs=FILE")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of each answer")
    parser.add_argument("--max-length", type=int, default=None, metavar="N", help="tokens that the model sees at once")


def run(args: argparse.Namespace) -> int:
    """Evaluate, add each task's score to those before, and print how they compare.

    Args:
        args: The parsed options.

    Returns:
        0, or 3 after a significant fall.
    """
    from deepseek_cli import evaluate
    from deepseek_eval.item_scores import read_item_scores
    from deepseek_records.exit_codes import MISSED
    from deepseek_serving.monitoring.evaluations import add_evaluation

    at = time.time()
    folder = Path(args.requests) / f"evaluation-{int(at)}"
    words = [args.url, "--tasks", args.tasks, "--output", str(folder)]
    for name in ("tokenizer", "limit", "data", "max_new_tokens", "max_length"):
        value = getattr(args, name)
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    parser.set_defaults(subparser=parser)
    evaluate.run(parser.parse_args(words))
    has_fallen = False
    for task, scores in read_item_scores(folder).items():
        row = add_evaluation(Path(args.requests), at, task, scores)
        against = "the first" if row["p"] is None else f"p of a fall {row['p']:.2g}"
        print(f"{task}: {row['score']:.3f} of {row['n']}, {against}")
        has_fallen |= row["fell"]
    return MISSED if has_fallen else 0
