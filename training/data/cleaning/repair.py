"""Unicode repair by ftfy: text that was decoded with the wrong encoding, and characters that carry no text.

Typography stays: curly quotes, full-width Chinese punctuation and ligatures are the author's own.
"""

import re

import ftfy

# Only letters that were encoded twice, control characters and line ends; NFC joins a letter with its accent.
_CONFIG = ftfy.TextFixerConfig(
    unescape_html=False,
    uncurl_quotes=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    normalization="NFC",
    max_decode_length=1_000_000,
    explain=False,
)
_INVISIBLE = re.compile("[\u200b\u2060\ufeff\u00ad]")


def repair(text: str) -> tuple[str, dict[str, int]]:
    """Return the repaired text and what was done.

    Args:
        text: A text as it was read.
    """
    fixed = ftfy.fix_text(text, _CONFIG)
    visible = _INVISIBLE.sub("", fixed)
    return visible, {"encoding": int(fixed != text), "invisible": int(visible != fixed)}
