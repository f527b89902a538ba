"""``deepseek-moe export``: a checkpoint or an adapter that others load without our code."""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EDGE = ("onnx", "browser", "executorch")
HELP = "Write a checkpoint or an adapter that others load without this package."
EXAMPLES = """
  deepseek-moe export path/to/fixed/model exported --to deepseek_v3
  deepseek-moe export path/to/fixed/model fixed.gguf --to gguf
  deepseek-moe export runs/demo/align/model model.gguf --to gguf --fixed-experts 2
  deepseek-moe export my-adapter expert-lora --to expert_lora
  deepseek-moe export runs/pretrain/checkpoints/checkpoint-4000 whole
  deepseek-moe export runs/demo/align phone --to onnx
  deepseek-moe export runs/demo/align page --to browser
"""
# What only some formats have, with those formats.
_OPTIONS = {
    "fixed_experts": ("gguf",),
    "base": ("expert_lora",),
    "data": EDGE,
    "gather_gib": EDGE,
    "cache_tokens": ("executorch",),
    "runtime": ("browser",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "model", help="a checkpoint of ours: a folder or a Hub id (gguf: a folder; expert_lora: an adapter's folder)"
    )
    parser.add_argument("output", help="the folder to write, empty or absent (gguf: a folder or FILE.gguf)")
    formats = ("deepseek_v3", "deepseek_v2", "gguf", "expert_lora", "whole", *EDGE)
    parser.add_argument(
        "--to",
        choices=formats,
        help="the format (default: deepseek_v3; of a checkpoint that several processes wrote in parts whole, the "
        "ordinary checkpoint with per-expert names that every other command reads)",
    )
    parser.add_argument(
        "--fixed-experts",
        type=int,
        metavar="N",
        help="gguf: export a dynamic number of experts per token at this fixed one, and print the measured difference",
    )
    parser.add_argument(
        "--base", help="expert_lora: the base model, where it lies elsewhere than the adapter says (any MoE family)"
    )
    parser.add_argument(
        "--data", help="onnx, browser, executorch: text to measure the export on, as for evaluate (default: books)"
    )
    parser.add_argument(
        "--gather-gib",
        type=float,
        metavar="GIB",
        help="onnx, browser, executorch: most memory on the device for gathered experts' weights (default: 1)",
    )
    parser.add_argument(
        "--cache-tokens",
        type=int,
        metavar="N",
        help="executorch: longest text, prompt included (default: the model's context, at most 512)",
    )
    parser.add_argument(
        "--runtime", metavar="DIR", help="browser: where npm installed onnxruntime-web (default: the user's cache)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint and print where it lies."""
    from deepseek_records.checkpoint_parts import is_in_parts

    if args.to is None:
        args.to = "whole" if is_in_parts(args.model) else "deepseek_v3"
    for name, formats in _OPTIONS.items():
        if getattr(args, name) is not None and args.to not in formats:
            raise ValueError(f"--{name.replace('_', '-')}: goes with --to {', '.join(formats)} only")
    if args.to == "whole":
        return _export_whole(args)
    if args.to in EDGE:
        return _export_edge(args)
    if args.to == "gguf":
        return _export_gguf(args)
    if args.to == "expert_lora":
        from deepseek_serving.expert_lora import export_expert_lora

        print(f"expert adapter  {export_expert_lora(args.model, args.output, args.base)}")
        return 0
    from deepseek_records.loading import load_model, load_tokenizer
    from deepseek_serving.hf_export import export_deepseek_v2, export_deepseek_v3

    export = export_deepseek_v2 if args.to == "deepseek_v2" else export_deepseek_v3
    export(load_model(args.model, dtype="auto"), args.output)
    try:
        load_tokenizer(args.model).save_pretrained(args.output)
    except (ValueError, FileNotFoundError) as error:
        print(f"no tokenizer exported: {error}", file=sys.stderr)
    print(f"{args.to} checkpoint  {args.output}")
    return 0


def _export_whole(args: argparse.Namespace) -> int:
    from deepseek_records.checkpoint_parts import is_in_parts, join_parts
    from deepseek_records.loading import load_tokenizer
    from deepseek_records.output_paths import check_output

    if not is_in_parts(args.model):
        raise ValueError(f"model: got {args.model}, expected a checkpoint that several processes wrote in parts")
    started = time.monotonic()
    num_bytes = join_parts(args.model, check_output(args.output))
    seconds = time.monotonic() - started
    run = Path(args.model).resolve().parents[1]  # a finished one holds the tokenizer, in its model
    try:
        load_tokenizer(run).save_pretrained(args.output)
    except (ValueError, FileNotFoundError):
        print("no tokenizer exported: the run has not finished", file=sys.stderr)
    print(f"whole checkpoint  {args.output}: {num_bytes / 1e6:.2f} MB in {seconds:.1f} s")
    return 0


def _export_edge(args: argparse.Namespace) -> int:
    import torch

    from deepseek_records.loading import load_model, load_tokenizer
    from deepseek_serving.edge.export_folder import check_free
    from deepseek_serving.edge.packages import check_packages
    from deepseek_training.data.texts import load_texts

    check_packages(args.to)
    check_free(args.output)
    options: dict[str, Any] = {"texts": load_texts(args.data or "books", "validation")}
    if args.gather_gib is not None:
        options["most_gathered_gib"] = args.gather_gib
    model, tokenizer = load_model(args.model, dtype=torch.float32), load_tokenizer(args.model)
    if args.to == "onnx":
        from deepseek_serving.edge.onnx_export import export_onnx

        measured = export_onnx(model, tokenizer, args.output, **options)
    elif args.to == "browser":
        from deepseek_serving.edge.browser_export import export_browser

        measured = export_browser(model, tokenizer, args.output, runtime=args.runtime, **options)
    else:
        from deepseek_serving.edge.executorch_export import PROGRAM, export_executorch

        cache_tokens = args.cache_tokens
        measured = {PROGRAM: export_executorch(model, tokenizer, args.output, cache_tokens=cache_tokens, **options)}
    for name, agreement in measured.items():
        size = Path(args.output, name).stat().st_size / 1e6
        print(f"{name}  {size:.2f} MB, {agreement}")
    print(f"{args.to} export  {args.output}")
    if args.to == "browser":
        print(f"open it with: python -m http.server --bind 127.0.0.1 --directory {args.output}")
    return 0


def _export_gguf(args: argparse.Namespace) -> int:
    from deepseek_serving.gguf_export import export_gguf

    with _whole_checkpoint(args.model) as model:
        path = export_gguf(model, args.output, fixed_experts=args.fixed_experts)
        if args.fixed_experts is not None:
            from deepseek_serving.fixed_experts import measure_fixed_experts

            print(measure_fixed_experts(model, args.fixed_experts))
    print(f"gguf file  {path}")
    return 0


@contextlib.contextmanager
def _whole_checkpoint(name: str) -> Iterator[str]:
    """The model's folder, or for an adapter one with the merged model, for what reads the files by itself."""
    from deepseek_records.loading import is_adapter, load_model, load_tokenizer, resolve_checkpoint

    if not is_adapter(resolve_checkpoint(name)):
        yield name
        return
    with tempfile.TemporaryDirectory() as folder:
        load_model(name, dtype="auto").save_pretrained(folder)
        load_tokenizer(name).save_pretrained(folder)
        yield folder
