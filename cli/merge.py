"""``deepseek-moe merge``: an adapter added to its base model's weights, or a model between two, as a checkpoint."""

import argparse
from pathlib import Path

HELP = "Add a LoRA adapter to its base model's weights, or go from a model towards another, and write a checkpoint."
EXAMPLES = """
  deepseek-moe merge runs/lora/adapter merged
  deepseek-moe merge runs/lora/adapter merged_bf16 --base my-model --dtype bfloat16
  deepseek-moe merge runs/demo/pretrain/model between --toward runs/demo/adapt/model --alpha 0.5
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "adapter",
        metavar="ADAPTER",
        help="a folder with adapter_config.json, as PEFT writes it; with --toward a model",
    )
    parser.add_argument("output", help="the folder to write, empty or absent")
    parser.add_argument("--base", help="the base model, a folder or Hub id (default: the one that the adapter names)")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="weights' type"
    )
    parser.add_argument(
        "--toward", metavar="NEW", help="another checkpoint of the same model, to go a part of the way to"
    )
    parser.add_argument("--alpha", type=float, help="that part, in [0, 1] (default: 0.5)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that lies in the checkpoint")


def run(args: argparse.Namespace) -> int:
    """Merge and print where the model lies."""
    from deepseek_records.output_paths import check_output, make_output

    output = check_output(args.output)
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"output: got {output}, expected an empty or absent folder")
    if args.toward is not None:
        return _go_toward(args, output)
    if args.alpha is not None:
        raise ValueError(f"--alpha: got {args.alpha}, expected none without --toward")
    from deepseek_records.loading import is_adapter, load_tokenizer, merge_adapter, resolve_checkpoint

    source = resolve_checkpoint(args.adapter)
    if not is_adapter(source):
        raise FileNotFoundError(
            f"adapter: got {args.adapter}, expected a folder with adapter_config.json and no model"
        )
    model = merge_adapter(source, args.base, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    tokenizer = load_tokenizer(source if args.base is None else args.base, trust_remote_code=args.trust_remote_code)
    model.save_pretrained(make_output(output))
    tokenizer.save_pretrained(output)
    print(f"merged model  {output}")
    return 0


def _go_toward(args: argparse.Namespace, output: Path) -> int:
    """Write the model between two."""
    from deepseek_training.continual.merge_weights import merge_weights

    if args.base is not None or args.dtype != "auto" or args.trust_remote_code:
        raise ValueError("--toward: got it with --base, --dtype or --trust-remote-code, expected it alone")
    alpha = 0.5 if args.alpha is None else args.alpha
    print(f"merged model  {merge_weights(args.adapter, args.toward, output, alpha)}")
    return 0
