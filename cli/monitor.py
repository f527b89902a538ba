"""``deepseek-moe monitor``: watches a served model, one nested subcommand each, by `deepseek_serving.monitoring`."""

import argparse
import time
from pathlib import Path
from typing import Any

HELP = "Watch a served model: a page, drift against its release, alarms."
EXAMPLES = """
  deepseek-moe monitor http://127.0.0.1:8000 --ui
  deepseek-moe monitor reference runs/demo/align/model --data dialogues
  deepseek-moe monitor drift runs/requests --model runs/demo/align/model
  deepseek-moe monitor rules runs/alarms
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the nested subcommands.

    Args:
        parser: The parser of ``monitor``.
    """
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True, action=_UrlOrName)
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
    parser.add_argument("--output", dest="file", metavar="FILE", help="else drift_reference.npz in MODEL")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of each text, at most")
    parser.add_argument("--max-tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--limit", type=int, default=4000, help="texts, evenly drawn")
    parser.add_argument("--at-least", type=int, default=2000, help="texts; with fewer, windows are small and say less")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that lies in the checkpoint")


def _write_reference(args: argparse.Namespace) -> int:
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


def _add_thresholds(parser: argparse.ArgumentParser) -> None:
    """What alarms and page go by; the article's by default."""
    parser.add_argument("--latency", type=float, default=0.5, metavar="S", help="slower requests are slow")
    parser.add_argument("--memory", type=float, default=0.9, metavar="SHARE", help="of memory, over five minutes")
    parser.add_argument("--drift", type=float, default=0.15, metavar="NATS", help="of the daily check")


def _add_rules(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUT", help="a folder for the files")
    parser.add_argument("--target", default="127.0.0.1:8000", help="host and port of the server")
    parser.add_argument("--webhook", default="http://127.0.0.1:8090/alerts", help="where Alertmanager posts alarms")
    parser.add_argument("--alertmanager", default="127.0.0.1:9093", help="its host and port")
    _add_thresholds(parser)
    parser.add_argument("--api-key-file", metavar="FILE", help="the server's, for Prometheus to send")
    parser.add_argument("--check", action="store_true", help="have promtool and amtool check and test the files")


def _write_rules(args: argparse.Namespace) -> int:
    from deepseek_serving.monitoring.alarm_files import check_with_promtool, write_alarms
    from deepseek_serving.monitoring.alarms import AlarmSettings

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


def _add_page(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="the server, for example http://127.0.0.1:8000")
    parser.add_argument("--ui", action="store_true", help="serve the page; without it, print the figures once")
    parser.add_argument("--port", type=int, default=8090, help="of the page; 0 takes any that is free")
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="between two looks at the server")
    parser.add_argument("--requests", metavar="DIR", help="the server's --requests, for drift and evaluations")
    parser.add_argument("--reference", metavar="FILE", help="drift_reference.npz, for the experts at release")
    parser.add_argument("--history", metavar="FILE", help="keep alarms here, for the next page too")
    parser.add_argument("--api-key-file", metavar="FILE", help="the server's key")
    _add_thresholds(parser)


def _show_page(args: argparse.Namespace) -> int:
    from deepseek_records.exit_codes import RunFailedError
    from deepseek_serving.monitoring.alarm_history import AlarmHistory
    from deepseek_serving.monitoring.alarms import AlarmSettings
    from deepseek_serving.monitoring.drift_reference import load_reference
    from deepseek_serving.monitoring.page import make_server, serve_page
    from deepseek_serving.monitoring.watch import Watch

    if not 0.1 <= args.every <= 3600:
        raise ValueError(f"--every: got {args.every:g}, expected 0.1 to 3600 seconds")
    watch = Watch(
        args.url.rstrip("/").removesuffix("/v1"),
        every_s=args.every,
        settings=AlarmSettings(latency_s=args.latency, memory_ratio=args.memory, drift_nats=args.drift),
        requests_folder=None if args.requests is None else Path(args.requests),
        reference=None if args.reference is None else load_reference(Path(args.reference)),
        api_key=None if args.api_key_file is None else Path(args.api_key_file).read_text(encoding="utf-8").strip(),
        alarms=AlarmHistory(None if args.history is None else Path(args.history)),
    )
    watch.look()
    state = watch.state()
    if state["failed"]:
        raise RunFailedError(f"{watch.url} does not answer /metrics ({state['failed']})")
    if not args.ui:
        print(format_state(state))
        return 0
    server = make_server(watch, args.port)
    print(f"the page is at http://127.0.0.1:{server.server_address[1]}; Ctrl-C ends it", flush=True)
    serve_page(watch, server)
    return 0


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="the server, for example http://127.0.0.1:8000")
    parser.add_argument("--requests", metavar="DIR", required=True, help="the server's; results go there")
    parser.add_argument("--task", default="humaneval", help="one that is answered by programs")
    parser.add_argument("--limit", type=int, help="first problems of the task (all without it)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of each answer")


def _evaluate(args: argparse.Namespace) -> int:
    import json

    from deepseek_cli import evaluate
    from deepseek_records.exit_codes import MISSED
    from deepseek_serving.monitoring.evaluations import add_evaluation

    at = time.time()
    folder = Path(args.requests) / f"evaluation-{int(at)}"
    words = [args.url, "--tasks", args.task, "--max-new-tokens", str(args.max_new_tokens), "--output", str(folder)]
    words += [] if args.limit is None else ["--limit", str(args.limit)]
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    parser.set_defaults(subparser=parser)
    evaluate.run(parser.parse_args(words))
    with open(folder / f"samples_{args.task}.jsonl", encoding="utf-8") as file:
        scores = {row["id"]: float(row["passed"]) for row in map(json.loads, file)}
    row = add_evaluation(Path(args.requests), at, args.task, scores)
    against = "the first" if row["p"] is None else f"p of a fall {row['p']:.2g}"
    print(f"{args.task}: {row['score']:.3f} of {row['n']}, {against}")
    return MISSED if row["fell"] else 0


def _add_manifests(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="OUT", help="the file to write")
    parser.add_argument("--engine", default="endpoint", help="endpoint (deepseek-moe serve), triton or vllm")
    parser.add_argument("--image", required=True, help="the container image with the engine")
    parser.add_argument("--claim", required=True, help="the PersistentVolumeClaim that holds the model")
    parser.add_argument("--model", required=True, help="the model's folder in it; for Triton, the repository's")
    parser.add_argument("--name", default="deepseek-moe", help="of all objects")
    parser.add_argument("--replicas", type=int, default=1, help="pods")
    parser.add_argument("--gpus", type=int, default=0, help="of each pod")
    parser.add_argument("--cpus", type=int, default=4, help="of each pod")
    parser.add_argument("--memory-gib", type=int, default=16, help="of each pod")


def _write_manifests(args: argparse.Namespace) -> int:
    from deepseek_serving.monitoring.alarms import AlarmSettings
    from deepseek_serving.monitoring.kubernetes import ManifestSettings, write_manifests

    names = ("engine", "name", "image", "claim", "model", "replicas", "gpus", "memory_gib", "cpus")
    settings = ManifestSettings(**{name: getattr(args, name) for name in names})
    write_manifests(Path(args.file), settings, AlarmSettings())
    print(f"{args.file}: Deployment, Service, PodMonitor and PrometheusRule of {args.name}")
    return 0


def format_state(state: dict[str, Any]) -> str:
    """Return the figures of one look in a few lines.

    Args:
        state: From `Watch.state`.
    """
    last = state["series"][-1]
    memory = ", ".join(f"{kind} {ratio:.0%}" for kind, ratio in last["memory"].items())
    lines = [
        f"{state['model'] or state['url']}: {last['running']:g} in the batch, {last['waiting']:g} waiting",
        f"memory: {memory}",
    ]
    for layer in state["layers"]:
        most = max(range(len(layer["now"])), key=lambda expert: layer["now"][expert])
        lines.append(f"{layer['name']}: expert {most} has most of the load, {layer['now'][most]:.1%}")
    firing = [row for row in state["alarms"] if row["ended"] is None]
    lines += [f"{row['name']}: {row['text']}" for row in firing] or ["no alarm"]
    return "\n".join(lines)


class _UrlOrName(argparse._SubParsersAction):  # type: ignore[type-arg]
    """Takes an address in place of a nested subcommand's name: `monitor URL` is `monitor page URL`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._name_parser_map = self.choices = _Names()

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        name = "page" if _is_address(values[0]) else values[0]
        given = values if name != values[0] else values[1:]
        super().__call__(parser, namespace, [name, *given], option_string)


class _Names(dict[str, argparse.ArgumentParser]):
    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or _is_address(name)


def _is_address(name: object) -> bool:
    return isinstance(name, str) and name.startswith(("http://", "https://"))


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
    "page": (
        _add_page,
        _show_page,
        "Show a server: latency, memory, drift, experts and alarms; monitor URL is the same.",
        """
  deepseek-moe monitor http://127.0.0.1:8000
  deepseek-moe monitor http://127.0.0.1:8000 --ui --requests runs/requests
""",
    ),
    "evaluate": (
        _add_evaluate,
        _evaluate,
        "Score the served model and compare with its first score; exit code 3 after a significant fall.",
        """
  deepseek-moe monitor evaluate http://127.0.0.1:8000 --requests runs/requests --task humaneval --limit 40
""",
    ),
    "manifests": (
        _add_manifests,
        _write_manifests,
        "Write what Kubernetes needs to run and watch the server.",
        """
  deepseek-moe monitor manifests moe.yaml --image registry/moe:1 --claim models --model demo
  deepseek-moe monitor manifests moe.yaml --engine vllm --gpus 8 --image vllm/vllm-openai --claim models --model v3
""",
    ),
}
