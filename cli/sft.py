"""``deepseek-moe sft``: teach a model to answer, between adapt and align."""

import argparse

from deepseek_cli.stage_command import add_stage_arguments, run_stage
from deepseek_records.summary import Summary

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
    from deepseek_training.recipes.sft import SftRecipe

    add_stage_arguments(parser, SftRecipe, "runs/sft")


def run(args: argparse.Namespace) -> int:
    """Train and print what it came to."""
    from deepseek_training.recipes.sft import SftRecipe

    return run_stage(args, "sft", SftRecipe, _tell)


def _tell(summary: Summary) -> None:
    for check in summary.checks:
        print(f"held-out answers: bits per byte {check.value:+.1%} ({'ok' if check.passed else 'missed'})")
