"""The half of ``deepseek-moe serve`` that starts Triton Inference Server; `serve.py` calls it."""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Classes that stand for the embedded classifier, which belongs to `training`: the server loads it by name.
EMBEDDED_SAFETY = "deepseek_training.rewards.safety_classifier:EmbeddedSafety"
KINDS = ("score", "embed", "generate", "safety", "reward")
_SEQUENCE_CLASSES = "ForSequenceClassification"

# Said once: the slower way is the one with limits.
_LIMITED = (
    "triton: with a limit on its queue Triton can hold a request that comes while the model works for half a second; "
    "--no-queue-limit has neither"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that only Triton has."""
    group = parser.add_argument_group("Triton Inference Server (--engine triton)")
    group.add_argument("--write", metavar="REPO", help="write the model repository there and start nothing")
    group.add_argument("--kinds", metavar="KINDS", help=f"some of {','.join(KINDS)}, by commas; else all that apply")
    group.add_argument("--reward", metavar="MODEL", help="a reward model to serve beside MODEL")
    group.add_argument("--safety", metavar="MODEL", help="a safety classifier; else the embedded one")
    group.add_argument("--max-batch", type=int, default=32, help="requests in one execution; 1: no dynamic batching")
    group.add_argument(
        "--queue-delay", type=float, default=5.0, metavar="MS", help="how long a batch waits for more requests"
    )
    group.add_argument(
        "--no-queue-limit",
        action="store_true",
        help="--max-waiting and --timeout for generation alone; else Triton can hold a request half a second",
    )
    group.add_argument("--grpc-port", type=int, default=8001, help="0 takes any that is free")
    group.add_argument("--metrics-port", type=int, default=8002, help="0 takes any that is free")
    group.add_argument("--triton", metavar="DIR", help="where `make serve-setup` installed it")


def run(args: argparse.Namespace, api_key: str | None) -> int:
    """Write the repository; start the server and watch it until a signal, unless ``--write`` was given.

    Args:
        args: The options.
        api_key: What clients must send; None asks for nothing.
    """
    from deepseek_serving.triton_server.installation import find_installation

    _check(args)
    installation = None if args.write else find_installation(args.triton)
    with _folder(args.write) as folder:
        repository = _write(args, folder)
        if installation is None:
            print(f"wrote {', '.join(sorted(path.name for path in repository.iterdir()))} to {repository}")
            return 0
        return _serve(args, installation, repository, api_key)


def _serve(args: argparse.Namespace, installation: Any, repository: Path, api_key: str | None) -> int:
    from deepseek_serving.triton_server.ports import Listening, find_free_ports
    from deepseek_serving.triton_server.process import TritonProcess
    from deepseek_serving.triton_server.supervision import Supervisor

    free = iter(find_free_ports(3))
    http_port, grpc_port, metrics_port = (
        port or next(free) for port in (args.port, args.grpc_port, args.metrics_port)
    )
    tls = (Path(args.tls_cert), Path(args.tls_key)) if args.tls_cert else None
    listening = Listening(http_port, grpc_port, metrics_port, grpc_host=args.host, api_key=api_key, tls=tls)
    process = TritonProcess(installation, repository, listening, grace_s=args.grace)
    supervisor = Supervisor(process)
    try:
        process.start()
        supervisor.begin()
        if not args.no_queue_limit and process.models != ["generate"]:
            print(_LIMITED, file=sys.stderr)
        print(
            f"serving {', '.join(process.models)} by Triton at http://127.0.0.1:{http_port} and "
            f"{'grpcs' if tls else 'grpc'}://{args.host}:{grpc_port}, {'with' if api_key else 'without'} an API key; "
            f"metrics at http://127.0.0.1:{metrics_port}/metrics; Ctrl-C ends it",
            flush=True,
        )
        supervisor.run()
    except KeyboardInterrupt as error:
        told = ", ".join(f"{name} {number}" for name, number in supervisor.restarts.items() if number)
        error.args = (f"brought back: {told or 'nothing'}",)
        raise
    finally:
        process.stop()
    return 0


@contextlib.contextmanager
def _folder(write: str | None) -> Iterator[Path]:
    if write is not None:
        yield Path(write)
        return
    with tempfile.TemporaryDirectory(prefix="deepseek-moe-repository-") as folder:
        yield Path(folder, "models")


def _write(args: argparse.Namespace, folder: Path) -> Path:
    import torch

    from deepseek_eval.model_loading import find_max_length
    from deepseek_records.loading import load_config, load_tokenizer, resolve_checkpoint
    from deepseek_serving.triton_server.repository import BatchingSettings, ServedModel, write_repository

    def describe(kind: str, name: str) -> ServedModel:
        if ":" in name:
            return ServedModel(kind, name, 0, {})
        source = resolve_checkpoint(name)
        source = str(Path(source).resolve()) if Path(source).is_dir() else source
        tokenizer = load_tokenizer(name, trust_remote_code=args.trust_remote_code)
        context = find_max_length(load_config(name), tokenizer)
        return ServedModel(kind, source, context, limits if kind == "generate" else {}, args.trust_remote_code)

    limits = {
        name: getattr(args, name)
        for name in ("max_tokens", "max_running", "max_waiting", "cache_tokens", "max_batch_tokens")
    } | {"timeout_s": args.timeout}
    max_waiting = None if args.no_queue_limit else args.max_waiting
    batching = BatchingSettings(args.max_batch, args.queue_delay, max_waiting, args.timeout)
    models = [describe(kind, name) for kind, name in _choose(args, load_config(args.model)).items()]
    return write_repository(folder, models, batching, is_gpu=torch.cuda.is_available())


def _choose(args: argparse.Namespace, config: Any) -> dict[str, str]:
    """Which kinds are served, each by which checkpoint."""
    is_classifier = any(_SEQUENCE_CLASSES in name for name in config.architectures or ())
    if is_classifier:
        found = {"reward" if config.num_labels == 1 else "safety": args.model}
    else:
        found = {"score": args.model, "embed": args.model, "generate": args.model}
    found["safety"] = args.safety or found.get("safety", EMBEDDED_SAFETY)
    if args.reward:
        found["reward"] = args.reward
    asked = [*found] if args.kinds is None else args.kinds.split(",")
    for kind in asked:
        if kind not in found:
            raise ValueError(
                f"--kinds: got {kind!r}, expected some of {', '.join(found)}"
                + ("; --reward names a reward model" if kind == "reward" else "")
            )
    return {kind: name for kind, name in found.items() if kind in asked}


def _check(args: argparse.Namespace) -> None:
    if not 1 <= args.max_batch <= 1024:
        raise ValueError(f"--max-batch: got {args.max_batch}, expected 1 to 1024")
    if not 0 <= args.queue_delay <= 10_000:
        raise ValueError(f"--queue-delay: got {args.queue_delay}, expected 0 to 10000 milliseconds")
    for name in ("grpc_port", "metrics_port"):
        if not 0 <= getattr(args, name) < 2**16:
            raise ValueError(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected 0 to 65535")
