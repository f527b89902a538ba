"""``deepseek-moe merge``: an adapter added to the weights of its base model, as one ordinary checkpoint."""

import argparse

HELP = "Add a LoRA adapter to its base model's weights and write an ordinary checkpoint."
EXAMPLES = """
  deepseek-moe merge runs/lora/adapter merged
  deepseek-moe merge runs/lora/adapter merged_bf16 --base my-model --dtype bfloat16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder with adapter_config.json, as PEFT writes it")
    parser.add_argument("output", help="the folder to write, empty or absent")
    parser.add_argument("--base", help="the base model, a folder or Hub id (default: the one that the adapter names)")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="weights' type"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that lies in the checkpoint")


def run(args: argparse.Namespace) -> int:
    """Merge and print where the model lies."""
    from deepseek_records.output_paths import check_output, make_output

    output = check_output(args.output)
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"output: got {output}, expected an empty or absent folder")
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
