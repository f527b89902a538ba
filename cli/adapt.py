"""``deepseek-moe adapt``: stage 2, from a recipe."""

import argparse

from deepseek_cli.stage_command import add_run_arguments, close_with_targets

HELP = "Continue a model on a domain with replayed general text (stage 2)."
EXAMPLES = """
  deepseek-moe adapt adapt-debug --model runs/first/model --output runs/second
  deepseek-moe adapt adapt-demo --model runs/demo/pretrain/model --data my_domain.jsonl --output runs/domain
  deepseek-moe adapt adapt-debug --model runs/demo/pretrain/model --lora-rank 8 --output runs/lora

An interrupted run goes on when the same command is given again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the recipe, its settings and where to write."""
    from deepseek_training.recipes.loading import add_recipe_arguments
    from deepseek_training.recipes.pretrain_and_adapt import AdaptRecipe

    add_recipe_arguments(parser, AdaptRecipe)
    add_run_arguments(parser, "runs/adapt")


def run(args: argparse.Namespace) -> int:
    """Train and print what changed."""
    from deepseek_training.recipes.loading import collect_overrides, load_recipe
    from deepseek_training.recipes.pretrain_and_adapt import AdaptRecipe

    recipe = load_recipe(args.recipe, AdaptRecipe, collect_overrides(args))

    from accelerate import PartialState

    from deepseek_training.stages.adapt import adapt

    summary = adapt(recipe, args.output, overwrite=args.overwrite, is_dry=args.dry_run)
    if summary is None:
        return 0
    if PartialState().is_main_process:
        for check in summary.checks:
            print(f"{check.dataset}: bits per byte {check.value:+.1%} ({'ok' if check.passed else 'missed'})")
        print(f"model in {args.output}/model after {summary.seconds:.0f} s")
    return close_with_targets(args, summary.missed)
