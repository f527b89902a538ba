"""``deepseek-moe grpo``: GRPO by TRL under the same rewards as `align`."""

import argparse

from deepseek_cli.stage_command import add_stage_arguments, print_gain, run_stage

HELP = "Align a model with GRPO, by TRL's GRPOTrainer, under the same rewards as align."
EXAMPLES = """
  deepseek-moe grpo grpo-debug --model runs/demo/sft/model --prompt-template null --output runs/grpo
  deepseek-moe grpo grpo-debug --model runs/demo/sft/model --lora-rank 4 --output runs/grpo_lora
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the recipe, its settings and where to write."""
    from deepseek_training.recipes.grpo import GrpoRecipe

    add_stage_arguments(parser, GrpoRecipe, "runs/grpo")


def run(args: argparse.Namespace) -> int:
    """Train and print what it came to."""
    from deepseek_training.recipes.grpo import GrpoRecipe

    return run_stage(args, "grpo", GrpoRecipe, print_gain)
