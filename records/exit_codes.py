"""The exit codes of every ``deepseek-moe`` command, and the error of a run that failed.

- 0: done.
- 1: failed; one line where the cause lies outside (a full disk, a reward that raised, a training that diverged), a
  traceback where it is a defect of ours.
- 2: bad input; one line, ``setting: got X, expected Y``.
- 3: done and everything is written, but a target was missed.
- 130 and 143: interrupted by Ctrl-C or SIGTERM, with a checkpoint.

`docs/commands.md` says the same to users.
"""

DONE = 0
FAILED = 1
BAD_INPUT = 2
MISSED = 3


class RunFailedError(Exception):
    """A run failed on its way, through nothing that a check at the start could have found; told in one line."""


class SameInAllProcessesError(ValueError):
    """Bad input that all processes of a training find together; the first one tells."""
