"""``deepseek-moe monitor``: watches a served model, one nested subcommand each, by `deepseek_serving.monitoring`."""

import argparse
import time
from pathlib import Path
from typing import Any

HELP = "Watch a served model: drift against its release, alarms."
EXAMPLES = """
  deepseek-moe monitor reference runs/demo/align/model --data dialogues
  deepseek-moe monitor drift runs/requests --model runs/demo/align/model
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the nested subcommands.

    Args:
        parser: The parser of ``monitor``.
    """
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, (declare, act, text, examples) in COMMANDS.items():
        nested = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"examples:\n{examples.rstrip()}",
            formatter_class=parser.formatter_class,
        )
        declare(nested)
        nested.add_argument("--traceback", action="store_true", help="show where an error came from")
        nested.set_defaults(act=act, subparser=nested)


def run(args: argparse.Namespace) -> int:
    """Do what the nested subcommand says."""
    return args.act(args)


def _add_reference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a local folder or a Hub id")
    parser.add_argument(
        "--data", required=True, metavar="TEXTS", help="what is asked: a file or folder of texts, or an embedded name"
    )
    parser.add_argument("--output", metavar="FILE", help="else drift_reference.npz in MODEL")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of each text, at most")
    parser.add_argument("--max-tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--limit", type=int, default=4000, help="texts, evenly drawn")
    parser.add_argument("--at-least", type=int, default=2000, help="texts; with fewer, windows are small and say less")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that lies in the checkpoint")


def _write_reference(args: argparse.Namespace) -> int:
    from deepseek_records.loading import resolve_checkpoint
    from deepseek_serving.monitoring.drift_reference import FILE_NAME

    if args.output is None and not Path(resolve_checkpoint(args.model)).is_dir():
        raise ValueError("--output: got none for a model of the Hub, expected a file to write")
    path = Path(args.output) if args.output else Path(resolve_checkpoint(args.model)) / FILE_NAME
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


def _add_drift(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("requests", metavar="REQUESTS", help="the folder of deepseek-moe serve --requests")
    parser.add_argument("--model", metavar="MODEL", required=True, help="the served model, for its tokenizer")
    parser.add_argument("--reference", metavar="FILE", help="else drift_reference.npz in MODEL")
    parser.add_argument("--hours", type=float, default=24.0, help="length of the window that is compared")


def _measure_drift(args: argparse.Namespace) -> int:
    if not 0 < args.hours < 1e5:
        raise ValueError(f"--hours: got {args.hours}, expected above 0 and below 100000")
    from deepseek_records.exit_codes import MISSED
    from deepseek_records.loading import load_tokenizer, resolve_checkpoint
    from deepseek_serving.monitoring.drift_job import format_report, measure_drift
    from deepseek_serving.monitoring.drift_reference import FILE_NAME

    path = Path(args.reference) if args.reference else Path(resolve_checkpoint(args.model)) / FILE_NAME
    tokenizer = load_tokenizer(args.model)
    report = measure_drift(
        Path(args.requests),
        path,
        hours=args.hours,
        until=time.time(),
        decode=lambda number: tokenizer.decode([number]),
    )
    print(format_report(report))
    return MISSED if any(row["is_alarm"] or row["is_warning"] for row in report["rows"]) else 0


def _add_rules(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUT", help="a folder for the files")
    parser.add_argument("--target", default="127.0.0.1:8000", help="host and port of the server")
    parser.add_argument("--webhook", default="http://127.0.0.1:8090/alerts", help="where Alertmanager posts alarms")
    parser.add_argument("--alertmanager", default="127.0.0.1:9093", help="its host and port")
    parser.add_argument("--latency", type=float, default=0.5, metavar="S", help="slower requests are slow")
    parser.add_argument("--memory", type=float, default=0.9, metavar="SHARE", help="of memory, over five minutes")
    parser.add_argument("--drift", type=float, default=0.15, metavar="NATS", help="of the daily check")
    parser.add_argument("--api-key-file", metavar="FILE", help="the server's, for Prometheus to send")
    parser.add_argument("--check", action="store_true", help="have promtool and amtool check and test the files")


def _write_rules(args: argparse.Namespace) -> int:
    from deepseek_serving.monitoring.alarm_tests import check_with_promtool
    from deepseek_serving.monitoring.alarms import AlarmSettings, write_alarms

    settings = AlarmSettings(
        target=args.target,
        webhook=args.webhook,
        latency_s=args.latency,
        memory_ratio=args.memory,
        drift_nats=args.drift,
        api_key_file=args.api_key_file,
        alertmanager=args.alertmanager,
    )
    for path in write_alarms(Path(args.output), settings):
        print(path)
    if args.check:
        print("\n".join(check_with_promtool(Path(args.output))))
    return 0


COMMANDS: dict[str, tuple[Any, Any, str, str]] = {
    "reference": (
        _add_reference,
        _write_reference,
        "Write the reference that drift is measured against, beside the checkpoint.",
        """
  deepseek-moe monitor reference runs/demo/align/model --data dialogues
""",
    ),
    "drift": (
        _add_drift,
        _measure_drift,
        "Compare the last day's requests with the reference; exit code 3 with an alarm or a warning.",
        """
  deepseek-moe monitor drift runs/requests --model runs/demo/align/model
  deepseek-moe monitor drift runs/requests --model MODEL --hours 1
""",
    ),
    "rules": (
        _add_rules,
        _write_rules,
        "Write alarms for Prometheus and Alertmanager, with tests of them.",
        """
  deepseek-moe monitor rules runs/alarms
  deepseek-moe monitor rules runs/alarms --latency 1 --memory 0.8 --check
""",
    ),
}
