"""``deepseek-moe doctor``: what would go wrong in a training without an error message."""

import argparse
import json
from typing import Any

HELP = "Find what would go wrong in a training without an error message, before it is paid for."
EXAMPLES = """
  deepseek-moe doctor runs/demo/align
  deepseek-moe doctor runs/demo/adapt/model --recipe sft-demo
  deepseek-moe doctor deepseek-ai/DeepSeek-V2-Lite --adapter my-adapter --recipe my-sft.yaml
  deepseek-moe doctor runs/demo/sft --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", help="a checkpoint, a run folder or a Hub id, of any family of transformers")
    parser.add_argument("--adapter", metavar="FOLDER", help="a LoRA adapter that PEFT saved")
    parser.add_argument(
        "--recipe", metavar="RECIPE", help="a recipe's name, or a YAML file of ours or of TRL: the training to come"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print one line per fault, with its cure.

    Returns:
        0 if nothing was found, else 3.
    """
    from deepseek_records.doctor import examine, open_subject
    from deepseek_training.recipes.loading import find_recipe, read_settings

    recipe = None if args.recipe is None else read_settings(find_recipe(args.recipe))
    is_own = recipe is not None and _is_of_a_stage(recipe)
    examination = examine(open_subject(args.model, adapter=args.adapter, recipe=recipe, is_own_stage=is_own))
    if args.json:
        print(json.dumps({"model": args.model, **examination.to_json()}, indent=2, ensure_ascii=False))
        return 3 if examination.findings else 0
    for check, finding in examination.findings.items():
        print(f"{check}: {finding.message}. Cure: {finding.cure}")
    print(f"{len(examination.findings)} found, {len(examination.passed)} passed")
    for check, reason in examination.not_checked.items():
        print(f"not checked: {check} ({reason})")
    return 3 if examination.findings else 0


def _is_of_a_stage(recipe: dict[str, Any]) -> bool:
    """Whether a stage of ours takes these settings: none is lacking or unknown, and they are not all transformers'."""
    import dataclasses

    from transformers import TrainingArguments

    from deepseek_training.recipes.write_docs import STAGES

    if set(recipe) <= {one.name for one in dataclasses.fields(TrainingArguments)}:
        return False
    for recipe_class in STAGES.values():
        fields = dataclasses.fields(recipe_class)
        needed = {one.name for one in fields if one.default is one.default_factory is dataclasses.MISSING}
        if needed - {"model"} <= set(recipe) <= {one.name for one in fields}:
            return True
    return False
