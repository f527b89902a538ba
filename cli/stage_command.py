"""What the commands that train share: options, the line on the reward, and the exit code of a missed target."""

import argparse
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

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


def print_gain(args: argparse.Namespace, summary: "Summary") -> None:
    """Print, once for all processes, how the held-out reward changed and where the model is.

    Args:
        args: The parsed options.
        summary: Of a stage that trains under a reward.
    """
    from accelerate import PartialState

    gain = summary.gain
    if PartialState().is_main_process and gain is not None:
        error = "" if gain.stderr_paired is None else f"paired standard error {gain.stderr_paired:.4f}, "
        print(f"held-out reward {gain.value:+.4f} ({error}n {gain.n})")
        print(f"model in {args.output}/model after {summary.seconds:.0f} s")


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
