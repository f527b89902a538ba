"""Which script a text is in, and how text without spaces between words is cut.

The embedded rewards were made for English and Chinese. `find_foreign_script` tells what they cannot judge.
"""

import re
import unicodedata
from collections import Counter

from deepseek_training.rewards.function_words import CONTENT_WORDS_ZH, FUNCTION_WORDS_ZH

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
UNSPACED = f"{_HAN}\u3005-\u3007\u3040-\u30ff"  # for a character class: Han and kana
_IS_HAN = re.compile(f"[{_HAN}]+")
_FOREIGN_LETTER = re.compile(f"[^\\W\\d_a-zA-Z\u00aa\u00ba\u00c0-\u02ff\u1e00-\u1eff\uff21-\uff5a\u3005-\u3007{_HAN}]")
_LETTER = re.compile(r"[^\W\d_]")
FOREIGN_SHARE, KANA_SHARE = 0.5, 0.15  # of the letters; Japanese and Korean stand among Han


def _by_length(words: frozenset[str]) -> str:
    return "|".join(sorted(words, key=lambda word: (-len(word), word)))


_PIECE = re.compile(
    f"(?P<content>{_by_length(CONTENT_WORDS_ZH)})|(?P<function>{_by_length(FUNCTION_WORDS_ZH)})|(?P<other>.)"
)


def is_han(word: str) -> bool:
    """Return whether all of a word is Han characters."""
    return _IS_HAN.fullmatch(word) is not None


def cut_unspaced(run: str) -> list[tuple[str, int, int]]:
    """Return the words of a run of Han characters or kana, each with where it begins and ends.

    Function words are words; what stands between two of them is cut into pairs that overlap, so that a word of two
    characters is found wherever it stands; a single character between two is a word.

    Args:
        run: Characters without spaces or punctuation between them.
    """
    words: list[tuple[str, int, int]] = []
    begun = 0  # where the present stretch of content begins

    def close(end: int) -> None:
        pairs = range(begun, max(end - 1, begun + (end > begun)))
        words.extend((run[i : min(i + 2, end)], i, min(i + 2, end)) for i in pairs)

    for match in _PIECE.finditer(run):
        if match["function"]:
            close(match.start())
            words.append((match.group(), match.start(), match.end()))
            begun = match.end()
    close(len(run))
    return words


def find_foreign_script(text: str) -> str | None:
    """Return the script of a text that the embedded rewards were not made for, None for English or Chinese.

    Foreign is a text half of whose letters are neither Latin nor Han; a seventh is enough of kana and Hangul, which
    stand among Han characters.

    Args:
        text: The text.
    """
    foreign = _FOREIGN_LETTER.findall(text)
    if not foreign:
        return None
    share = len(foreign) / len(_LETTER.findall(text))
    names = Counter(unicodedata.name(letter, "UNKNOWN").split()[0].capitalize() for letter in foreign)
    script = names.most_common(1)[0][0]
    script = {"Hiragana": "Japanese", "Katakana": "Japanese"}.get(script, script)
    return script if share > (KANA_SHARE if script in ("Japanese", "Hangul") else FOREIGN_SHARE) else None


def han_share(text: str) -> float:
    """Return the share of the letters that are Han, 0 for a text without letters."""
    letters = len(_LETTER.findall(text))
    return sum(map(len, _IS_HAN.findall(text))) / letters if letters else 0.0
