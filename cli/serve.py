"""``deepseek-moe serve``: a server for one model, OpenAI-compatible with continuous batching, or Triton.

The parts are in `deepseek_serving.openai_endpoint` and, by `serve_triton.py`, in `deepseek_serving.triton_server`;
`docs/serving.md` is the page for users.
"""

import argparse
import os
import ssl
from pathlib import Path
from typing import Any

from deepseek_cli import serve_triton

HELP = "Serve a model to OpenAI's clients, or by Triton Inference Server, many requests in one batch."
EXAMPLES = """
  deepseek-moe serve runs/demo/align/model
  deepseek-moe serve runs/demo/align/model --port 0 --name demo --max-running 32
  deepseek-moe serve MODEL --host 0.0.0.0 --api-key-file key.txt --tls-cert cert.pem --tls-key key.pem
  deepseek-moe serve MODEL --engine triton
  deepseek-moe serve MODEL --engine triton --write models --max-batch 64
"""
KEY_VARIABLE = "DEEPSEEK_MOE_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help="a local folder or a Hub id")
    parser.add_argument("--engine", choices=("openai", "triton"), default="openai", help="what answers")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; only this machine reaches the default")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free")
    parser.add_argument("--name", help="the model's name for clients; else MODEL as typed")
    parser.add_argument(
        "--api-key-file", metavar="FILE", help=f"a file with the key that clients must send; or {KEY_VARIABLE} is set"
    )
    parser.add_argument(
        "--without-api-key", action="store_true", help="let everybody who reaches --host use the model"
    )
    parser.add_argument("--tls-cert", metavar="FILE", help="a certificate; answers are encrypted then")
    parser.add_argument("--tls-key", metavar="FILE", help="the certificate's private key")
    parser.add_argument(
        "--without-tls", action="store_true", help="let prompts and key pass other machines unencrypted"
    )
    parser.add_argument("--max-tokens", type=int, default=1024, help="the longest answer")
    parser.add_argument("--max-running", type=int, default=16, help="requests in one batch")
    parser.add_argument("--max-waiting", type=int, default=64, help="requests beside those; more are refused with 503")
    parser.add_argument("--cache-tokens", type=int, default=16384, help="tokens of all requests in the cache")
    parser.add_argument("--max-batch-tokens", type=int, default=512, help="tokens of one forward pass")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="seconds for one request")
    parser.add_argument(
        "--grace",
        type=float,
        default=20.0,
        metavar="S",
        help="seconds that requests may go on after Ctrl-C or SIGTERM",
    )
    parser.add_argument(
        "--requests", metavar="DIR", help="keep each request's counts (no text) here, for deepseek-moe monitor drift"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that lies in the checkpoint")
    serve_triton.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Take the port, load the model, and serve until a signal."""
    _check(args)
    api_key = _read_key(args)
    if args.engine == "triton":
        _check_reach(args, api_key)
        return serve_triton.run(args, api_key)
    try:
        from deepseek_serving.listening import bind
        from deepseek_serving.openai_endpoint.app import Service
        from deepseek_serving.openai_endpoint.engine import Engine, Limits
        from deepseek_serving.openai_endpoint.server import Server
    except ImportError as error:
        raise ValueError(
            f"serve: {error.name} is missing; pip install 'deepseek-moe[serve]' brings it, with transformers 5.23"
        ) from None
    _check_reach(args, api_key)
    with bind(args.host, args.port) as listener:
        model, tokenizer, context = _load(args)
        limits = Limits(
            context=context,
            max_tokens=args.max_tokens,
            max_running=args.max_running,
            max_waiting=args.max_waiting,
            timeout_s=args.timeout,
            cache_tokens=args.cache_tokens,
            max_batch_tokens=args.max_batch_tokens,
        )
        with Engine(model, limits) as engine:
            folder = None if args.requests is None else Path(args.requests)
            service = Service(engine, tokenizer, args.name or args.model, folder)
            host, port = listener.getsockname()[:2]
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            scheme = "https" if args.tls_cert else "http"
            kept = "MLA's latents" if engine.has_latents else "keys and values"
            print(
                f"serving {service.name} at {scheme}://{address}/v1 on {model.device}, "
                f"{'with' if api_key else 'without'} an API key; the cache holds {kept}; Ctrl-C ends it",
                flush=True,
            )
            try:
                tls = (args.tls_cert, args.tls_key) if args.tls_cert else None
                Server(service, api_key=api_key, grace_s=args.grace, tls=tls).run_on(listener)
            except KeyboardInterrupt as error:
                answered, others = service.metrics.count_answers()
                error.args = (f"{answered} requests got their answer, {others} a refusal or no answer",)
                raise
            finally:
                service.close()
    return 0


def _check_reach(args: argparse.Namespace, api_key: str | None) -> None:
    """Refuse what other machines could reach or read without somebody having said so."""
    from deepseek_serving.listening import is_loopback

    for name in ("tls_cert", "tls_key"):
        path = getattr(args, name)
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(f"--{name.replace('_', '-')}: {path} is not a file")
    if (args.tls_cert is None) != (args.tls_key is None):
        raise ValueError("--tls-cert: got one of certificate and key, expected both --tls-cert and --tls-key")
    if args.tls_cert is not None:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(args.tls_cert, args.tls_key)
        except ssl.SSLError as error:
            raise ValueError(
                f"--tls-cert: {args.tls_cert} with {args.tls_key} cannot be used ({error.reason})"
            ) from None
    if is_loopback(args.host):
        return
    if api_key is None and not args.without_api_key:
        raise ValueError(
            f"--host: got {args.host}, which other machines can reach, expected an API key with it: --api-key-file or "
            f"{KEY_VARIABLE}; --without-api-key serves everybody"
        )
    if args.tls_cert is None and not args.without_tls:
        raise ValueError(
            f"--host: got {args.host}, expected TLS with it as other machines reach it: --tls-cert, --tls-key; "
            "--without-tls sends prompts and the key unencrypted, for a proxy in front of it"
        )


def _load(args: argparse.Namespace) -> tuple[Any, Any, int]:
    import torch

    from deepseek_eval.model_loading import find_max_length
    from deepseek_records.loading import check_vocabulary, load_model, load_tokenizer

    tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    model = load_model(args.model, trust_remote_code=args.trust_remote_code, attn_implementation="sdpa")
    check_vocabulary(model, tokenizer)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model, tokenizer, find_max_length(model.config, tokenizer)


def _read_key(args: argparse.Namespace) -> str | None:
    """The key from the file, else from the environment."""
    if args.api_key_file is None:
        return os.environ.get(KEY_VARIABLE) or None
    key = Path(args.api_key_file).read_text(encoding="utf-8").strip()
    if not key.isascii() or not key.isprintable() or len(key) < 16:
        raise ValueError(f"--api-key-file: got {len(key)} characters, expected one line of at least 16 ASCII ones")
    return key


def _check(args: argparse.Namespace) -> None:
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port: got {args.port}, expected 0 to 65535")
    for name in ("max_tokens", "max_running", "cache_tokens", "max_batch_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected at least 1")
    if args.max_waiting < 0:
        raise ValueError(f"--max-waiting: got {args.max_waiting}, expected at least 0")
    for name, value in (("--timeout", args.timeout), ("--grace", args.grace)):
        if not 0 < value < 1e6:
            raise ValueError(f"{name}: got {value}, expected seconds above 0 and below a million")
