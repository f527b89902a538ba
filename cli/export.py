"""``deepseek-moe export``: a checkpoint that others load without our code."""

import argparse

HELP = "Write a checkpoint that stock transformers loads without this package."
EXAMPLES = """
  deepseek-moe export runs/demo/align/model exported --to deepseek_v3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", help="a checkpoint of ours: a folder or a Hub id")
    parser.add_argument("output", help="the folder to write; it must not exist or be empty")
    parser.add_argument("--to", choices=("deepseek_v3",), default="deepseek_v3", help="the format")


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint and print where it lies."""
    from modeling_deepseek.export import export_deepseek_v3

    export_deepseek_v3(args.model, args.output)
    print(f"{args.to} checkpoint  {args.output}")
    return 0
