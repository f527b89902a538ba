"""``deepseek-moe adapt``: stage 2, from a recipe."""

import argparse
from typing import Any

from deepseek_cli.stage_command import add_stage_arguments, run_stage
from deepseek_records.summary import Summary

HELP = "Continue a model on a domain with replayed general text (stage 2)."
EXAMPLES = """
  deepseek-moe adapt adapt-debug --model runs/first/model --output runs/second
  deepseek-moe adapt adapt-demo --model runs/demo/pretrain/model --data my_domain.jsonl --output runs/domain
  deepseek-moe adapt adapt-debug --model runs/demo/pretrain/model --lora-rank 8 --output runs/lora

An interrupted run goes on when the same command is given again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the recipe, its settings and where to write."""
    from deepseek_training.recipes.pretrain_and_adapt import AdaptRecipe

    add_stage_arguments(parser, AdaptRecipe, "runs/adapt")


def run(args: argparse.Namespace) -> int:
    """Train and print what it came to."""
    from deepseek_training.recipes.pretrain_and_adapt import AdaptRecipe

    return run_stage(args, "adapt", AdaptRecipe, _tell)


def _tell(summary: Summary) -> None:
    for check in summary.checks:
        print(f"{check.dataset}: bits per byte {check.value:+.1%} ({'ok' if check.passed else 'missed'})")
    if summary.details.get("stopped_at_step"):
        kept = summary.details["kept_step"]
        print(f"general text was being forgotten at step {summary.details['stopped_at_step']}: model of step {kept}")
    for line in tail_lines(summary.details.get("long_tail", {})):
        print(line)


def tail_lines(tail: dict[str, Any]) -> list[str]:
    """Return one line for each kind of the long tail's figures.

    Args:
        tail: Of the summary's details.
    """
    lines = []
    for kind, found in tail.get("after", {}).items():
        if "gap" in found and found["drop"][0] is not None:
            gap, drop = (_shown(found[name], spec) for name, spec in (("gap", "+.3f"), ("drop", "+.0%")))
            before = tail["before"][kind]
            old = _shown(before["gap"], "+.3f") if "gap" in before else "not known"
            where = f"{kind} in {found['tail']} documents against {found['head']}"
            lines.append(f"long tail, {where}: bits per byte {gap} (before {old}), accuracy {drop} of the head's")
    return lines


def _shown(pair: list[float], spec: str) -> str:
    value, error = pair
    return format(value, spec) if error is None else f"{value:{spec}} +- {error:{spec.lstrip('+')}}"
