"""``deepseek-moe quantize``: a model's routed experts in 4 bits, by AWQ."""

import argparse

HELP = "Put a model's routed experts into 4 bits by AWQ; they stay so in memory."
EXAMPLES = """
  deepseek-moe quantize runs/demo/adapt/model runs/int4 --group 32
  deepseek-moe quantize runs/demo/adapt/model runs/int4 --group 32 --data medicine --no-clip
  deepseek-moe quantize runs/demo/adapt/model runs/int4 --group 32 --feedback --calibration-tokens 32768
  deepseek-moe quantize runs/demo/adapt/model runs/nearest --group 32 --grid 0 --no-clip
  deepseek-moe quantize runs/demo/adapt/model runs/int4 --group 32 --dry-run

evaluate, generate and card take runs/int4 as they take any run.
"""
_OPTIONS = {
    "bits": "--bits",
    "group_size": "--group",
    "grid": "--grid",
    "scales": "--scales",
    "format": "--format",
    "data": "--data",
    "data_column": "--data-column",
    "calibration_tokens": "--calibration-tokens",
    "sequence_length": "--sequence-length",
    "batch_size": "--batch-size",
    "eval_bytes": "--eval-bytes",
    "max_loss": "--max-loss",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from deepseek_training.recipes.loading import describe_recipe
    from deepseek_training.recipes.quantize import QuantizeSettings

    texts = {name: (default, text) for name, default, text in describe_recipe(QuantizeSettings)}
    parser.add_argument("model", metavar="MODEL", help=texts["model"][1])
    parser.add_argument("output", metavar="OUT", help="run folder; the quantized model lies in its model/")
    for name, option in _OPTIONS.items():
        default, text = texts[name]
        suffix = "" if default == "null" else f" (default: {default})"
        parser.add_argument(option, dest=name, default=argparse.SUPPRESS, metavar="VALUE", help=f"{text}{suffix}")
    parser.add_argument("--clip", action=argparse.BooleanOptionalAction, default=True, help=texts["clip"][1])
    parser.add_argument("--feedback", action=argparse.BooleanOptionalAction, default=False, help=texts["feedback"][1])
    parser.add_argument("--overwrite", action="store_true", help="delete the run that the folder holds")
    parser.add_argument("--dry-run", action="store_true", help="print what would be quantized, and write nothing")


def run(args: argparse.Namespace) -> int:
    """Quantize and print what it cost."""
    from deepseek_cli.stage_command import close_with_targets
    from deepseek_training.recipes.loading import build_recipe, parse_value
    from deepseek_training.recipes.quantize import QuantizeSettings

    words = {name: getattr(args, name) for name in _OPTIONS if hasattr(args, name)}
    given = {name: parse_value(_OPTIONS[name].removeprefix("--"), word) for name, word in words.items()}
    settings = build_recipe(
        {"model": args.model, "clip": args.clip, "feedback": args.feedback, **given},
        QuantizeSettings,
        source="quantize",
    )

    from deepseek_training.stages.quantize import quantize

    summary = quantize(settings, args.output, overwrite=args.overwrite, is_dry=args.dry_run)
    if summary is None:
        return 0
    before, after = summary.results
    details = summary.details
    print(details["quantized"])
    few = details["experts_with_few_tokens"]
    if few:
        print(f"{few} experts saw fewer than 64 tokens and were calibrated on those of their whole layer as well")
    print(
        f"{after.dataset}: {before.value:.4f} -> {after.value:.4f} bits per byte, difference "
        f"{details['bits_per_byte_difference']:+.5f} +- {details['bits_per_byte_difference_stderr']:.5f}, "
        f"KL {details['kl_divergence']:.5f} nats a token"
    )
    print(f"{details['expert_bytes_per_weight']:.3f} bytes per expert weight")
    print(f"model in {args.output}/model after {summary.seconds:.0f} s")
    return close_with_targets(args, summary.missed)
