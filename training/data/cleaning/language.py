"""Which language a text is in, by py3langid, whose model of 133 languages is in its wheel.

A short or mixed text is easily taken for a rare language. So a text counts as one of the preferred languages unless
another is likelier by far.
"""

from collections.abc import Sequence

import py3langid

# Parts of a text that are looked at: enough to be sure, and long texts take no longer than short ones.
_PART, _PARTS = 400, 3
# Varieties that the model tells apart and a recipe does not.
_SAME = {"wuu": "zh", "yue": "zh", "nn": "no", "nb": "no"}
# By how much a language must be likelier than the preferred ones, in nats over the parts.
_MARGIN = 20.0
UNKNOWN = "und"


def identify(text: str, preferred: Sequence[str] = ()) -> str:
    """Return the ISO 639-1 code of a text's language, ``und`` for a text without letters.

    Args:
        text: The text; of a long one its beginning, middle and end are looked at.
        preferred: Languages that win where another is hardly likelier.
    """
    if not any(character.isalpha() for character in text):
        return UNKNOWN
    sample = text
    if len(text) > _PART * _PARTS:
        step = (len(text) - _PART) // (_PARTS - 1)
        sample = "\n".join(text[i * step : i * step + _PART] for i in range(_PARTS))
    ranked = [(_SAME.get(code, code), score) for code, score in py3langid.rank(sample)]
    best = ranked[0]
    for code, score in ranked:
        if code in preferred and best[1] - score <= _MARGIN:
            return str(code)
    return UNKNOWN if best[0] == "zxx" else str(best[0])


def known_languages() -> frozenset[str]:
    """Return every code that `identify` can give."""
    return frozenset(_SAME.get(code, code) for code, _ in py3langid.rank("a")) - {"zxx"}
