"""``deepseek-moe multimodal``: teach a model to see and hear."""

import argparse

from deepseek_cli.stage_command import add_stage_arguments, run_stage
from deepseek_records.summary import Summary

HELP = "Teach a language model to see and hear: encoders, projectors, two stages, replayed text."
EXAMPLES = """
  deepseek-moe multimodal multimodal-debug --model runs/first/model --output runs/seeing
  deepseek-moe multimodal multimodal-demo --model runs/demo/sft/model
  deepseek-moe multimodal multimodal-demo --model path/to/model --data "[my_pictures/, my_sounds.jsonl]"
  deepseek-moe multimodal multimodal-demo --model path/to/model --vision-encoder google/siglip-base-patch16-224
  deepseek-moe evaluate runs/multimodal --tasks digits,shapes,tones --output runs/seen

A row holds prompt, answer, and image, images, audio or sounds: files beside the table.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the recipe, its settings and where to write."""
    from deepseek_training.recipes.multimodal import MultimodalRecipe

    add_stage_arguments(parser, MultimodalRecipe, "runs/multimodal")


def run(args: argparse.Namespace) -> int:
    """Train and print what it came to."""
    from deepseek_training.recipes.multimodal import MultimodalRecipe

    return run_stage(args, "multimodal", MultimodalRecipe, _tell)


def _tell(summary: Summary) -> None:
    for check in summary.checks:
        print(f"{check.name}: {check.value:+.1%} ({'ok' if check.passed else 'missed'})")
