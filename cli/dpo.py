"""``deepseek-moe dpo``: direct preference optimization by TRL, on pairs of answers."""

import argparse

from deepseek_cli.stage_command import add_run_arguments, close_with_targets

HELP = "Teach a model to prefer better answers, by TRL's DPOTrainer on pairs."
EXAMPLES = """
  deepseek-moe dpo dpo-debug --model runs/demo/sft/model --data preferences.jsonl --output runs/dpo
  deepseek-moe dpo dpo-debug --model runs/demo/sft/model --data preferences.jsonl --lora-rank 4 --output runs/dpo_lora

A row holds prompt, chosen and rejected, each a text or a list of messages.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the recipe, its settings and where to write."""
    from deepseek_training.recipes.dpo import DpoRecipe
    from deepseek_training.recipes.loading import add_recipe_arguments

    add_recipe_arguments(parser, DpoRecipe)
    add_run_arguments(parser, "runs/dpo")


def run(args: argparse.Namespace) -> int:
    """Train and print what is preferred."""
    from deepseek_training.recipes.dpo import DpoRecipe
    from deepseek_training.recipes.loading import collect_overrides, load_recipe

    recipe = load_recipe(args.recipe, DpoRecipe, collect_overrides(args))

    from accelerate import PartialState

    from deepseek_training.stages.dpo import dpo

    summary = dpo(recipe, args.output, overwrite=args.overwrite, is_dry=args.dry_run)
    if summary is None:
        return 0
    if PartialState().is_main_process:
        for row in summary.results:
            print(f"held-out {row.metric.replace('_', ' ')}: {row.value:.3f} (n {row.n})")
        print(f"model in {args.output}/model after {summary.seconds:.0f} s")
    return close_with_targets(args, summary.missed)
