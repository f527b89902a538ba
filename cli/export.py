"""``deepseek-moe export``: a checkpoint or an adapter that others load without our code."""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator

HELP = "Write a checkpoint or an adapter that others load without this package."
EXAMPLES = """
  deepseek-moe export path/to/fixed/model exported --to deepseek_v3
  deepseek-moe export path/to/fixed/model fixed.gguf --to gguf
  deepseek-moe export runs/demo/align/model model.gguf --to gguf --fixed-experts 2
  deepseek-moe export my-adapter expert-lora --to expert_lora
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "model", help="a checkpoint of ours: a folder or a Hub id (gguf: a folder; expert_lora: an adapter's folder)"
    )
    parser.add_argument("output", help="the folder to write, empty or absent (gguf: a folder or FILE.gguf)")
    formats = ("deepseek_v3", "deepseek_v2", "gguf", "expert_lora")
    parser.add_argument("--to", choices=formats, default="deepseek_v3", help="the format")
    parser.add_argument(
        "--fixed-experts",
        type=int,
        metavar="N",
        help="gguf: export a dynamic number of experts per token at this fixed one, and print the measured difference",
    )
    parser.add_argument(
        "--base", help="expert_lora: the base model, where it lies elsewhere than the adapter says (any MoE family)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint and print where it lies."""
    if args.base is not None and args.to != "expert_lora":
        raise ValueError("--base: goes with --to expert_lora only")
    if args.to == "gguf":
        return _export_gguf(args)
    if args.fixed_experts is not None:
        raise ValueError("--fixed-experts: goes with --to gguf only")
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
