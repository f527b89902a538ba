"""Asks a server with so many clients at once, and says how many answers came per second and how late.

`serving.py` calls it with the functions of `serving_peers.py`.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from deepseek_training.data.texts import load_texts

PERCENTS = (50, 95, 99)
_HALF_CHARACTER = "\ufffd"


@dataclass
class Answer:
    """One answered request.

    Attributes:
        value: The text, or the score.
        num_tokens: Tokens written, or scored.
        seconds: From the request to the whole answer.
    """

    value: Any
    num_tokens: int
    seconds: float


def make_prompts(number: int) -> list[str]:
    """Return the first 4 to 19 words of embedded documents.

    Args:
        number: How many.
    """
    texts = load_texts("books")
    paragraphs = [part for text in texts for part in text.split("\n\n") if len(part.split()) > 20]
    return [" ".join(part.split()[: 4 + place % 16]) for place, part in enumerate(paragraphs[:number])]


def run_load(
    ask: Callable[[str], Answer], prompts: list[str], num_clients: int, expected: list[Any] | None
) -> dict[str, float]:
    """Return figures of one round.

    Args:
        ask: Asks for one answer.
        prompts: Each is asked once.
        num_clients: At the same time.
        expected: Values that the answers are held against; scores within 2e-4.
    """
    with ThreadPoolExecutor(num_clients) as pool:
        began = time.perf_counter()
        answers = list(pool.map(ask, prompts))
        seconds = time.perf_counter() - began
    waited = sorted(one.seconds for one in answers)
    figures = {f"p{percent}_s": waited[min(len(waited) - 1, len(waited) * percent // 100)] for percent in PERCENTS}
    figures |= {
        "requests_per_second": len(answers) / seconds,
        "tokens_per_second": sum(one.num_tokens for one in answers) / seconds,
    }
    if expected is not None:
        figures["num_equal"] = sum(is_equal(one.value, other) for one, other in zip(answers, expected, strict=True))
    return figures


def is_equal(value: Any, expected: Any) -> bool:
    """Return whether an answer is the expected one.

    Scores may differ by rounding. A text that was cut inside of a character ends in U+FFFD by transformers' decoding,
    and without that character by vLLM's: the tokens are the same.

    Args:
        value: A text or a score.
        expected: Likewise.
    """
    if isinstance(value, float):
        return abs(value - expected) < 2e-4
    return str(value).rstrip(_HALF_CHARACTER) == str(expected).rstrip(_HALF_CHARACTER)
