"""``deepseek-moe adapt``: stage 2, from a recipe."""

import argparse

from deepseek_cli.stage_command import add_stage_arguments, run_stage
from deepseek_records.summary import Summary

HELP = "Continue a model on a domain with replayed general text (stage 2)."
EXAMPLES = """
  deepseek-moe adapt adapt-debug --model runs/first/model --output runs/second
  deepseek-moe adapt adapt-demo --model runs/demo/pretrain/model --data my_domain.jsonl --output runs/domain
  deepseek-moe adapt adapt-debug --model runs/demo/pretrain/model --lora-rank 8 --output runs/lora

An interrupted run goes on when the same command is given again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the recipe, its settings and where to write."""
    from deepseek_training.recipes.pretrain_and_adapt import AdaptRecipe

    add_stage_arguments(parser, AdaptRecipe, "runs/adapt")


def run(args: argparse.Namespace) -> int:
    """Train and print what it came to."""
    from deepseek_training.recipes.pretrain_and_adapt import AdaptRecipe

    return run_stage(args, "adapt", AdaptRecipe, _tell)


def _tell(summary: Summary) -> None:
    for check in summary.checks:
        print(f"{check.dataset}: bits per byte {check.value:+.1%} ({'ok' if check.passed else 'missed'})")
