"""``deepseek-moe monitor``: watches a served model, one nested subcommand each, by `deepseek_serving.monitoring`."""

import argparse
import time
from pathlib import Path
from typing import Any

from deepseek_cli import monitor_evaluate, monitor_page, monitor_reference
from deepseek_cli.monitor_page import add_thresholds

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
    add_thresholds(parser)
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
        monitor_reference.add_arguments,
        monitor_reference.run,
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
        monitor_page.add_arguments,
        monitor_page.run,
        "Show a server: latency, memory, drift, experts and alarms; monitor URL is the same.",
        """
  deepseek-moe monitor http://127.0.0.1:8000
  deepseek-moe monitor http://127.0.0.1:8000 --ui --requests runs/requests
""",
    ),
    "evaluate": (
        monitor_evaluate.add_arguments,
        monitor_evaluate.run,
        "Score the served model and compare with its first score; exit code 3 after a significant fall.",
        """
  deepseek-moe monitor evaluate http://127.0.0.1:8000 --requests runs/requests --limit 40
  deepseek-moe monitor evaluate http://127.0.0.1:8000 --requests runs/requests --tokenizer MODEL --tasks bbq,refusal
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
