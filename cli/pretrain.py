"""``deepseek-moe pretrain``: stage 1, from a recipe."""

import argparse

from deepseek_cli.stage_command import add_run_arguments, close_with_targets
from deepseek_records.summary import Summary

HELP = "Pretrain a model from scratch on plain text (stage 1)."
EXAMPLES = """
  deepseek-moe pretrain pretrain-debug --output runs/first
  deepseek-moe pretrain pretrain-demo --data my_texts/ --max-steps 2000 --output runs/mine
  deepseek-moe pretrain pretrain-demo --preset 154b --dry-run
  deepseek-moe pretrain my_recipe.yaml --model "{n_routed_experts: 32}" --output runs/more_experts

An interrupted run goes on when the same command is given again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the recipe, its settings and where to write."""
    from deepseek_training.recipes.loading import add_recipe_arguments
    from deepseek_training.recipes.pretrain_and_adapt import PretrainRecipe

    add_recipe_arguments(parser, PretrainRecipe)
    add_run_arguments(parser, "runs/pretrain")


def run(args: argparse.Namespace) -> int:
    """Train and print where the result lies."""
    from deepseek_training.recipes.loading import collect_overrides, load_recipe
    from deepseek_training.recipes.pretrain_and_adapt import PretrainRecipe

    recipe = load_recipe(args.recipe, PretrainRecipe, collect_overrides(args))

    from accelerate import PartialState

    from deepseek_training.stages.pretrain import pretrain

    summary = pretrain(recipe, args.output, overwrite=args.overwrite, is_dry=args.dry_run)
    if summary is None:
        return 0
    if PartialState().is_main_process:
        _report(summary, args.output)
    return close_with_targets(args, summary.missed)


def _report(summary: Summary, output: str) -> None:
    for row in summary.results:
        print(
            f"{row.dataset}: {row.value:.4f} +- {row.stderr:.4f} bits per byte "
            f"({row.baseline_name}: {row.baseline:.4f})"
        )
    print(f"model in {output}/model after {summary.seconds:.0f} s")
