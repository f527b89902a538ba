"""Writes ``docs/recipes.md``, the table of every recipe's settings, from the fields that explain them.

Run ``python -m deepseek_training.recipes.write_docs docs/recipes.md`` after changing a setting; a test compares.
"""

import sys
from pathlib import Path

from deepseek_training.recipes.align import AlignRecipe
from deepseek_training.recipes.data import DataRecipe
from deepseek_training.recipes.distill import DistillRecipe
from deepseek_training.recipes.dpo import DpoRecipe
from deepseek_training.recipes.grpo import GrpoRecipe
from deepseek_training.recipes.loading import describe_recipe, list_recipes
from deepseek_training.recipes.multimodal import MultimodalRecipe
from deepseek_training.recipes.pretrain_and_adapt import AdaptRecipe, PretrainRecipe
from deepseek_training.recipes.sft import SftRecipe
from deepseek_training.recipes.update import UpdateRecipe

STAGES = {
    "data": DataRecipe,
    "pretrain": PretrainRecipe,
    "adapt": AdaptRecipe,
    "update": UpdateRecipe,
    "distill": DistillRecipe,
    "sft": SftRecipe,
    "align": AlignRecipe,
    "grpo": GrpoRecipe,
    "dpo": DpoRecipe,
    "multimodal": MultimodalRecipe,
}
_INTRODUCTION = """# Recipes

A stage is run from a recipe: one YAML file, an embedded name or a path.

    deepseek-moe pretrain pretrain-demo --data my_texts/ --max-steps 2000 --output runs/mine

Any setting can be replaced on the command line, with dashes or underscores; the value is YAML, and a mapping such as
`--model "{n_routed_experts: 32}"` is merged into the recipe's. An unknown key fails and names the nearest one. A run
that was interrupted goes on from its last complete checkpoint when the same command is given again.

Where text is named, these work: the embedded `books`, `medicine`, `finance`, `prose_zh` and `dialogues`; a .txt, .md,
.jsonl, .json, .csv, .tsv or .parquet file, also compressed (.gz, .bz2, .xz, .zst); a folder of such files; a directory
written by `datasets`; a Hub id (`owner/name` or `owner/name:configuration`). Rows with a `split` column keep theirs;
otherwise one document in ten is held out, by a hash of its text. `data` of pretrain and adapt can also be a list of
sources with weights ([your data](your_data.md#train-on-several-sources)).

This page is written by `python -m deepseek_training.recipes.write_docs docs/recipes.md`.
"""


def recipes_page() -> str:
    """Return the page."""
    parts = [_INTRODUCTION, f"Embedded recipes: {', '.join(f'`{name}`' for name in list_recipes())}.\n"]
    for stage, recipe_class in STAGES.items():
        rows = [f"| `{name}` | {default} | {text} |" for name, default, text in _cells(recipe_class)]
        parts.append("\n".join([f"## {stage}\n", "| setting | default | meaning |", "| --- | --- | --- |", *rows, ""]))
    return "\n".join(parts)


def _cells(recipe_class: type) -> list[tuple[str, ...]]:
    return [tuple(text.replace("|", "\\|") for text in row) for row in describe_recipe(recipe_class)]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(recipes_page(), encoding="utf-8")
