"""``deepseek-moe align``: PPO under the weighted reward."""

import argparse

from deepseek_cli.stage_command import add_run_arguments, close_with_targets, print_gain

HELP = "Align a model with PPO under 0.7 relevance + 0.2 safety + 0.1 diversity."
EXAMPLES = """
  deepseek-moe align align-debug --model runs/demo/adapt/model --output runs/align
  deepseek-moe align align-demo --model my-model --prompts prompts.jsonl --prompt-sources [] --output runs/more
  deepseek-moe align align-debug --model my-model --lora-rank 8 --output runs/align_lora
  torchrun --nproc_per_node 2 -m deepseek_cli.main align align-demo --model my-model --output runs/two
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from deepseek_training.recipes.align import AlignRecipe
    from deepseek_training.recipes.loading import add_recipe_arguments

    add_recipe_arguments(parser, AlignRecipe)
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Align and print the gain."""
    from deepseek_training.recipes.loading import collect_overrides, load_recipe
    from deepseek_training.stages.align import AlignRecipe, align

    recipe = load_recipe(args.recipe, AlignRecipe, collect_overrides(args))
    summary = align(recipe, args.output, overwrite=args.overwrite, is_dry=args.dry_run)
    if summary is None:
        return 0
    print_gain(args, summary)
    return close_with_targets(args, summary.missed)
