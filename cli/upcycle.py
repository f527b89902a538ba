"""``deepseek-moe upcycle``: a mixture of experts made of a dense model."""

import argparse

HELP = "Make a mixture of experts of a dense Llama-like model; it computes the same until it is trained."
EXAMPLES = """
  deepseek-moe upcycle path/to/llama runs/mixture --n-routed-experts 8 --num-experts-per-tok 2 --dry-run
  deepseek-moe upcycle path/to/llama runs/mixture --n-routed-experts 8 --num-experts-per-tok 2
  deepseek-moe upcycle path/to/llama runs/fine --n-routed-experts 16 --num-experts-per-tok 4 --granularity 2

adapt and sft then train the experts apart.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from deepseek_training.recipes.loading import add_setting_arguments, setting_helps
    from deepseek_training.recipes.upcycle import UpcycleSettings

    parser.add_argument("model", metavar="DENSE", help=setting_helps(UpcycleSettings)["model"])
    parser.add_argument("output", metavar="OUT", help="run folder; the mixture lies in its model/")
    add_setting_arguments(parser, UpcycleSettings, but=("model",))
    parser.add_argument("--overwrite", action="store_true", help="delete the run that the folder holds")
    parser.add_argument("--dry-run", action="store_true", help="print what would be made, and write nothing")


def run(args: argparse.Namespace) -> int:
    """Make the mixture and print how far it is from the dense model."""
    from deepseek_training.recipes.loading import build_recipe, collect_overrides
    from deepseek_training.recipes.upcycle import UpcycleSettings

    settings = build_recipe({"model": args.model, **collect_overrides(args)}, UpcycleSettings, source="upcycle")

    from deepseek_training.stages.upcycle import upcycle

    summary = upcycle(settings, args.output, overwrite=args.overwrite, is_dry=args.dry_run)
    if summary is None:
        return 0
    before, after = summary.results
    details = summary.details
    print(details["upcycled"])
    print(
        f"logits at {details['positions']} positions differ by at most {details['max_logit_difference']:.2g}, "
        f"the largest is {details['largest_logit']:.3g}"
    )
    if details["share_of_other_positions"]:
        print(
            f"at {details['share_of_other_positions']:.1%} of them by more than rounding: two copies tied in a router"
        )
    print(f"{after.dataset}: {before.value:.4f} -> {after.value:.4f} bits per byte, not trained")
    print(f"model in {args.output}/model after {summary.seconds:.0f} s")
    return 0
