"""One line where the other processes of a training no longer answer.

A process that dies breaks the connections of the others, or leaves them waiting until `collective_timeout_s`. Either
way they raise an error of their library's, pages long, from wherever they were.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from deepseek_records.exit_codes import RunFailedError
from deepseek_training.trainer.whereabouts import Whereabouts

# What gloo and NCCL say when a peer is gone, or does not come.
_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "timed out",
    "Socket Timeout",
    "remote process exited",
)


@contextlib.contextmanager
def telling_of_lost_processes(trainer: Any, whereabouts: Whereabouts | None = None) -> Iterator[None]:
    """Raise a one-line error where a process waits for others in vain.

    Args:
        trainer: A stage's.
        whereabouts: Knows which did not come, and where it was.

    Raises:
        RunFailedError: Another process is gone, or did not come within `collective_timeout_s`.
    """
    try:
        yield
    except RuntimeError as error:
        args = trainer.args
        if args.world_size == 1 or isinstance(error, RunFailedError) or not any(s in str(error) for s in _SIGNS):
            raise
        is_late = "imed out" in str(error) or "Timeout" in str(error)
        missing = whereabouts.describe_missing() if is_late and whereabouts is not None else None
        what = f"did not come within {args.ddp_timeout} s" if is_late else "is gone"
        raise RunFailedError(
            f"training: process {args.process_index} of {args.world_size} was left alone in step "
            f"{trainer.state.global_step + 1}, {missing or 'another'} {what}; the same command goes on from "
            "the last checkpoint"
        ) from error
