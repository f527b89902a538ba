"""YAML from a user's file or command line: every way in which it can be broken is one error with one short reason.

PyYAML raises errors of its own for a wrong sign, but lets through those of Python for a date that does not exist, a
number without digits or brackets within brackets without end.
"""

from typing import Any

import yaml


def parse_yaml(text: str) -> Any:
    """Return the value that a text holds.

    Args:
        text: The text.

    Raises:
        ValueError: It is not YAML; the message is a reason without a capital letter and a full stop, such as
            ``line 3: could not find expected ':'``.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        reason = problem or " ".join(str(error).split())
        raise ValueError(f"line {mark.line + 1}: {reason}" if mark else reason) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (ValueError, IndexError, OverflowError) as error:  # of a date or a number
        raise ValueError(f"a value that cannot be read: {error}") from None
