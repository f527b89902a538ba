"""``deepseek-moe sft``: teach a model to answer, between adapt and align."""

import argparse

from deepseek_cli.stage_command import add_run_arguments, close_with_targets

HELP = "Teach a model to answer questions, by TRL's SFTTrainer (optional, before align)."
EXAMPLES = """
  deepseek-moe sft sft-debug --model runs/first/model --output runs/taught
  deepseek-moe sft sft-demo --model runs/demo/adapt/model --data my_conversations.jsonl --sources [] --output runs/mine
  deepseek-moe sft sft-debug --model runs/demo/adapt/model --lora-rank 8 --output runs/taught_lora
  deepseek-moe align align-debug --model runs/taught/model --prompt-template null --output runs/aligned

A row holds prompt and answer, or messages: a list of turns, each with role and content.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the recipe, its settings and where to write."""
    from deepseek_training.recipes.loading import add_recipe_arguments
    from deepseek_training.recipes.sft import SftRecipe

    add_recipe_arguments(parser, SftRecipe)
    add_run_arguments(parser, "runs/sft")


def run(args: argparse.Namespace) -> int:
    """Train and print what changed."""
    from deepseek_training.recipes.loading import collect_overrides, load_recipe
    from deepseek_training.recipes.sft import SftRecipe

    recipe = load_recipe(args.recipe, SftRecipe, collect_overrides(args))

    from accelerate import PartialState

    from deepseek_training.stages.sft import sft

    summary = sft(recipe, args.output, overwrite=args.overwrite, is_dry=args.dry_run)
    if summary is None:
        return 0
    if PartialState().is_main_process:
        for check in summary.checks:
            print(f"held-out answers: bits per byte {check.value:+.1%} ({'ok' if check.passed else 'missed'})")
        print(f"model and chat template in {args.output}/model after {summary.seconds:.0f} s")
    return close_with_targets(args, summary.missed)
