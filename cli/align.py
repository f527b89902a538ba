"""``deepseek-moe align``: PPO under the weighted reward."""

import argparse

from deepseek_cli.stage_command import add_stage_arguments, print_gain, run_stage

HELP = "Align a model with PPO under 0.7 relevance + 0.2 safety + 0.1 diversity."
EXAMPLES = """
  deepseek-moe align align-debug --model runs/demo/adapt/model --output runs/align
  deepseek-moe align align-demo --model my-model --prompts prompts.jsonl --prompt-sources [] --output runs/more
  deepseek-moe align align-debug --model my-model --lora-rank 8 --output runs/align_lora
  torchrun --nproc_per_node 2 -m deepseek_cli.main align align-demo --model my-model --output runs/two
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the recipe, its settings and where to write."""
    from deepseek_training.recipes.align import AlignRecipe

    add_stage_arguments(parser, AlignRecipe)


def run(args: argparse.Namespace) -> int:
    """Train and print what it came to."""
    from deepseek_training.recipes.align import AlignRecipe

    return run_stage(args, "align", AlignRecipe, print_gain)
