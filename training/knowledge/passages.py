"""Text cut into passages that each answer one question about one topic, where its own structure tells of them.

MedQuAD's pages and others of questions and answers say what they are about (focus) and which question is answered;
both become part of the graph. Text without such lines is a passage without topic.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

# Section by the words of the question, the first that fits.
_SECTIONS = (
    ("symptoms", r"symptoms? (?:of|for)|signs of"),
    ("treatments", r"treat(?:ment|ed)|be treated|what to do for"),
    ("outlook", r"outlook|prognosis"),
    ("causes", r"what causes|what are the causes|genetic changes"),
    ("risk", r"at risk|risk factors"),
    ("diagnosis", r"diagnos|tests for"),
    ("prevention", r"prevent"),
    ("complications", r"complications?"),
    ("stages", r"stages"),
    ("inheritance", r"inherited"),
    ("frequency", r"how many people|how common"),
    ("research", r"research"),
    ("definition", r"what is|what are|do you have information about"),
)
_QUESTION = re.compile(r"^(?:what|who|how|is|are|do|does|which|when|why)\b[^\n]{3,200}\?[ \t]*$", re.I | re.M)
_TOPIC = re.compile(
    r"(?:what is \(are\)|what (?:is|are)(?! the\b)|symptoms of|treatments for|outlook for|causes of|what causes"
    r"|at risk for|to diagnose|to prevent|to do for|complications of|stages of|affected by"
    r"|changes related to|being done for|information about|^is|^are)\s+(.+?)(?:\s+inherited)?\s*\??\s*\??$",
    re.I,
)


@dataclasses.dataclass(frozen=True)
class Passage:
    """A stretch of a document.

    Args:
        document: Its id.
        topic: What it is about; empty where nothing says so.
        section: Which question about that; empty likewise.
        text: The stretch.
        begin: Where it begins in the document.
    """

    document: str
    topic: str
    section: str
    text: str
    begin: int = 0


def section_of(question: str) -> str:
    """Return which question about a topic a line asks; ``other`` for none that is known.

    Args:
        question: The line.
    """
    return next((name for name, pattern in _SECTIONS if re.search(pattern, question, re.I)), "other")


def topic_of(question: str) -> str:
    """Return what a question is about, empty where its form is not known.

    Args:
        question: The line.
    """
    match = _TOPIC.search(question.strip())
    return match[1].strip(" ?") if match else ""


def cut_rows(rows: Iterable[dict[str, Any]], name: str) -> Iterator[Passage]:
    """Yield the passages of rows with a ``text``, or with ``focus``, ``question`` and ``answer`` as MedQuAD has them.

    Args:
        rows: The rows.
        name: Of the source, for documents without ``id``.
    """
    for number, row in enumerate(rows, start=1):
        document = str(row.get("id") or f"{name}#{number}")
        if row.get("focus") and "answer" in row:
            section = section_of(str(row.get("question") or ""))
            yield Passage(document, str(row["focus"]), section, str(row["answer"] or ""))
        else:
            yield from cut_text(str(row.get("text") or row.get("answer") or ""), document)


def cut_text(text: str, document: str) -> Iterator[Passage]:
    """Yield the passages of a text: one for each line that asks, of what follows it.

    Args:
        text: The text.
        document: Its id.
    """
    questions = list(_QUESTION.finditer(text))
    topic = next((found for match in questions if (found := topic_of(match[0]))), "")
    ends = [match.start() for match in questions[1:]] + [len(text)]
    if not questions or not topic:
        yield Passage(document, "", "", text)
        return
    for match, end in zip(questions, ends, strict=True):
        topic = topic_of(match[0]) or topic
        yield Passage(document, topic, section_of(match[0]), text[match.end() : end], match.end())
