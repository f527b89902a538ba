"""What a mistyped name was probably meant to be. Called wherever a message refuses a name."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[object], *, cutoff: float = 0.6, otherwise: str = "") -> str:
    """Return ``; did you mean NAME?`` with the nearest known name, or `otherwise` where none is near.

    Args:
        name: What was given.
        known: What there is.
        cutoff: Least likeness, from 0 to 1.
        otherwise: What to say instead.
    """
    near = difflib.get_close_matches(str(name), [str(one) for one in known], n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else otherwise
