"""``deepseek-moe dpo``: direct preference optimization by TRL, on pairs of answers."""

import argparse

from deepseek_cli.stage_command import add_stage_arguments, run_stage
from deepseek_records.summary import Summary

HELP = "Teach a model to prefer better answers, by TRL's DPOTrainer on pairs."
EXAMPLES = """
  deepseek-moe dpo dpo-debug --model runs/demo/sft/model --data preferences.jsonl --output runs/dpo
  deepseek-moe dpo dpo-debug --model runs/demo/sft/model --data preferences.jsonl --lora-rank 4 --output runs/dpo_lora

A row holds prompt, chosen and rejected, each a text or a list of messages.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the recipe, its settings and where to write."""
    from deepseek_training.recipes.dpo import DpoRecipe

    add_stage_arguments(parser, DpoRecipe, "runs/dpo")


def run(args: argparse.Namespace) -> int:
    """Train and print what it came to."""
    from deepseek_training.recipes.dpo import DpoRecipe

    return run_stage(args, "dpo", DpoRecipe, _tell)


def _tell(summary: Summary) -> None:
    for row in summary.results:
        print(f"held-out {row.metric.replace('_', ' ')}: {row.value:.3f} (n {row.n})")
