"""``deepseek-moe pretrain``: stage 1, from a recipe."""

import argparse

from deepseek_cli.stage_command import add_stage_arguments, run_stage
from deepseek_records.summary import Summary

HELP = "Pretrain a model from scratch on plain text (stage 1)."
EXAMPLES = """
  deepseek-moe pretrain pretrain-debug --output runs/first
  deepseek-moe pretrain pretrain-demo --data my_texts/ --max-steps 2000 --output runs/mine
  deepseek-moe pretrain pretrain-1b --data my_texts/ --output runs/1b
  deepseek-moe pretrain pretrain-154b --dry-run
  deepseek-moe pretrain my_recipe.yaml --model "{n_routed_experts: 32}" --output runs/more_experts

An interrupted run goes on when the same command is given again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the recipe, its settings and where to write."""
    from deepseek_training.recipes.pretrain_and_adapt import PretrainRecipe

    add_stage_arguments(parser, PretrainRecipe, "runs/pretrain")


def run(args: argparse.Namespace) -> int:
    """Train and print what it came to."""
    from deepseek_training.recipes.pretrain_and_adapt import PretrainRecipe

    return run_stage(args, "pretrain", PretrainRecipe, _tell)


def _tell(summary: Summary) -> None:
    for row in summary.results:
        print(
            f"{row.dataset}: {row.value:.4f} +- {row.stderr:.4f} bits per byte "
            f"({row.baseline_name}: {row.baseline:.4f})"
        )
