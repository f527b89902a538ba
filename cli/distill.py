"""``deepseek-moe distill``: a smaller model taught by a larger one, from a recipe."""

import argparse

from deepseek_cli.stage_command import add_stage_arguments, run_stage
from deepseek_records.summary import Summary

HELP = "Teach a smaller model by a larger one: cut out of it, begun anew, or there already."
EXAMPLES = """
  deepseek-moe distill distill-debug --teacher runs/first/model --output runs/small
  deepseek-moe distill distill-demo --teacher runs/demo/pretrain/model --cache runs/cache --output runs/third
  deepseek-moe distill distill-demo --teacher runs/demo/pretrain/model --start fresh --output runs/fresh

An interrupted run goes on when the same command is given again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the recipe, its settings and where to write."""
    from deepseek_training.recipes.distill import DistillRecipe

    add_stage_arguments(parser, DistillRecipe, "runs/distill")


def run(args: argparse.Namespace) -> int:
    """Train and print what it came to."""
    from deepseek_training.recipes.distill import DistillRecipe

    return run_stage(args, "distill", DistillRecipe, _tell)


def _tell(summary: Summary) -> None:
    before, after = summary.results
    print(
        f"{after.dataset}: {before.value:.4f} -> {after.value:.4f} +- {after.stderr:.4f} bits per byte "
        f"(teacher: {after.baseline:.4f})"
    )
    if "gap_closed" in summary.details:
        print(f"{summary.details['gap_closed']:.1%} of the way from the start to the teacher")
