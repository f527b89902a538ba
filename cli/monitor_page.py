"""``deepseek-moe monitor URL``: a served model's figures, printed once or served as a page."""

import argparse
from pathlib import Path
from typing import Any


def add_thresholds(parser: argparse.ArgumentParser) -> None:
    """Add what alarms and page go by; the article's by default.

    Args:
        parser: Of a command that needs them.
    """
    parser.add_argument("--latency", type=float, default=0.5, metavar="S", help="slower requests are slow")
    parser.add_argument("--memory", type=float, default=0.9, metavar="SHARE", help="of memory, over five minutes")
    parser.add_argument("--drift", type=float, default=0.15, metavar="NATS", help="of the daily check")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options.

    Args:
        parser: The command's parser.
    """
    parser.add_argument("url", metavar="URL", help="the server, for example http://127.0.0.1:8000")
    parser.add_argument("--ui", action="store_true", help="serve the page; without it, print the figures once")
    parser.add_argument("--port", type=int, default=8090, help="of the page; 0 takes any that is free")
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="between two looks at the server")
    parser.add_argument("--requests", metavar="DIR", help="the server's --requests, for drift and evaluations")
    parser.add_argument("--reference", metavar="FILE", help="drift_reference.npz, for the experts at release")
    parser.add_argument("--history", metavar="FILE", help="keep alarms here, for the next page too")
    parser.add_argument("--api-key-file", metavar="FILE", help="the server's key")
    add_thresholds(parser)


def run(args: argparse.Namespace) -> int:
    """Print the figures, or serve the page until it is ended.

    Args:
        args: The parsed options.

    Returns:
        0.
    """
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
