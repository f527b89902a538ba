"""What the commands that train share: options, the way through a stage, and the exit code of a missed target."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from deepseek_records.exit_codes import DONE, MISSED

if TYPE_CHECKING:
    from deepseek_records.summary import Summary


def add_run_arguments(parser: argparse.ArgumentParser, output: str | None = None) -> None:
    """Declare where to write, and whether to.

    Args:
        parser: The command's.
        output: The default folder; None: it must be given.
    """
    parser.add_argument("--output", default=output, required=output is None, help="run folder")
    parser.add_argument("--overwrite", action="store_true", help="delete the run that the folder holds")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would happen, what it needs and how long it takes, and write nothing",
    )


def add_stage_arguments(parser: argparse.ArgumentParser, recipe_class: type, output: str | None = None) -> None:
    """Declare a stage's recipe, its settings and where to write.

    Args:
        parser: The command's.
        recipe_class: What the recipe is read into.
        output: The default folder; None: it must be given.
    """
    from deepseek_training.recipes.loading import add_recipe_arguments

    add_recipe_arguments(parser, recipe_class)
    add_run_arguments(parser, output)


def run_stage(args: argparse.Namespace, name: str, recipe_class: type, tell: Callable[["Summary"], None]) -> int:
    """Run a stage, print what it came to, and return the exit code.

    The recipe is read before torch is imported, so that a wrong setting is told at once.

    Args:
        args: The parsed options.
        name: The stage: ``deepseek_training.stages.<name>`` holds a function of this name.
        recipe_class: As for `add_stage_arguments`.
        tell: Prints the stage's figures; called in one process of several.
    """
    from deepseek_training.recipes.loading import collect_overrides, load_recipe

    recipe: Any = load_recipe(args.recipe, recipe_class, collect_overrides(args))

    from accelerate import PartialState

    stage = getattr(importlib.import_module(f"deepseek_training.stages.{name}"), name)
    summary = stage(recipe, args.output, overwrite=args.overwrite, is_dry=args.dry_run)
    if summary is None:
        return DONE
    if PartialState().is_main_process:
        tell(summary)
        print(f"model in {args.output}/model after {summary.seconds:.0f} s")
    # Torn down by the interpreter's end instead, gloo's threads abort a process (torch 2.13, now and then).
    PartialState().destroy_process_group()
    return close_with_targets(args, summary.missed)


def print_gain(summary: "Summary") -> None:
    """Print how the held-out reward changed.

    Args:
        summary: Of a stage that trains under a reward.
    """
    gain = summary.gain
    if gain is not None:
        error = "" if gain.stderr_paired is None else f"paired standard error {gain.stderr_paired:.4f}, "
        print(f"held-out reward {gain.value:+.4f} ({error}n {gain.n})")


def close_with_targets(args: argparse.Namespace, missed: Iterable[str]) -> int:
    """Tell the missed targets in one line on stderr, and return the exit code.

    A process of several returns 0: a launcher such as torchrun takes any other code for a crash, ends its siblings and
    prints a traceback.

    Args:
        args: The parsed options.
        missed: The names of the targets.
    """
    names = ", ".join(missed)
    if not names:
        return DONE
    if os.environ.get("RANK", "0") == "0":
        print(f"{args.subparser.prog}: done, but a target was missed: {names}", file=sys.stderr)
    return MISSED if int(os.environ.get("WORLD_SIZE", "1")) == 1 else DONE
