"""``deepseek-moe grpo``: GRPO by TRL under the same rewards as `align`."""

import argparse

from deepseek_cli.stage_command import add_run_arguments, close_with_targets, print_gain

HELP = "Align a model with GRPO, by TRL's GRPOTrainer, under the same rewards as align."
EXAMPLES = """
  deepseek-moe grpo grpo-debug --model runs/demo/sft/model --prompt-template null --output runs/grpo
  deepseek-moe grpo grpo-debug --model runs/demo/sft/model --lora-rank 4 --output runs/grpo_lora
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the recipe, its settings and where to write."""
    from deepseek_training.recipes.grpo import GrpoRecipe
    from deepseek_training.recipes.loading import add_recipe_arguments

    add_recipe_arguments(parser, GrpoRecipe)
    add_run_arguments(parser, "runs/grpo")


def run(args: argparse.Namespace) -> int:
    """Align and print the gain."""
    from deepseek_training.recipes.grpo import GrpoRecipe
    from deepseek_training.recipes.loading import collect_overrides, load_recipe

    recipe = load_recipe(args.recipe, GrpoRecipe, collect_overrides(args))

    from deepseek_training.stages.grpo import grpo

    summary = grpo(recipe, args.output, overwrite=args.overwrite, is_dry=args.dry_run)
    if summary is None:
        return 0
    print_gain(args, summary)
    return close_with_targets(args, summary.missed)
