"""How the commands that train end: where the model lies, and the exit code of a missed target."""

import argparse
import os
import sys
from collections.abc import Iterable

from deepseek_records.exit_codes import DONE, MISSED


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
