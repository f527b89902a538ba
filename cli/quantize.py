"""``deepseek-moe quantize``: a model's routed experts in 4 bits, by AWQ."""

import argparse

HELP = "Put a model's routed experts into 4 bits by AWQ; they stay so in memory."
EXAMPLES = """
  deepseek-moe quantize runs/demo/adapt/model runs/int4 --group 32
  deepseek-moe quantize runs/demo/adapt/model runs/int4 --group 32 --data medicine --no-clip
  deepseek-moe quantize runs/demo/adapt/model runs/int4 --group 32 --grid 0 --feedback --calibration-tokens 32768
  deepseek-moe quantize runs/demo/adapt/model runs/nearest --group 32 --grid 0 --no-clip
  deepseek-moe quantize runs/demo/adapt/model runs/int4 --group 32 --dry-run

evaluate, generate and card take runs/int4 as they take any run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from deepseek_training.recipes.loading import add_setting_arguments, setting_helps
    from deepseek_training.recipes.quantize import QuantizeSettings

    helps = setting_helps(QuantizeSettings)
    parser.add_argument("model", metavar="MODEL", help=helps["model"])
    parser.add_argument("output", metavar="OUT", help="run folder; the quantized model lies in its model/")
    add_setting_arguments(parser, QuantizeSettings, but=("model", "clip", "feedback"), also={"group_size": "--group"})
    parser.add_argument("--clip", action=argparse.BooleanOptionalAction, default=True, help=helps["clip"])
    parser.add_argument("--feedback", action=argparse.BooleanOptionalAction, default=False, help=helps["feedback"])
    parser.add_argument("--overwrite", action="store_true", help="delete the run that the folder holds")
    parser.add_argument("--dry-run", action="store_true", help="print what would be quantized, and write nothing")


def run(args: argparse.Namespace) -> int:
    """Quantize and print what it cost."""
    from deepseek_cli.stage_command import close_with_targets
    from deepseek_training.recipes.loading import build_recipe, collect_overrides
    from deepseek_training.recipes.quantize import QuantizeSettings

    given = {"model": args.model, "clip": args.clip, "feedback": args.feedback, **collect_overrides(args)}
    settings = build_recipe(given, QuantizeSettings, source="quantize")

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
