"""MMLU under small changes that leave the right answer as it is: does the model still give it?

Each question is asked as it stands and then with typing errors, with its options moved (the three cyclic shifts), with
an unrelated sentence before it, and under a paraphrased instruction. Every change is drawn by a hash of the question's
id, so all models see the same ones. Options that speak of others by position ("all of the above", "A and
C") are not moved, and a question without a word to mistype has no such form; ``limit`` counts questions per subject.

References: typing errors as Pruthi et al., 2019, arXiv 1905.11268 (inside a word: swap, drop, add, neighboring key);
unrelated sentences after Shi et al., 2023, arXiv 2302.00093; instructions after Mizrahi et al., 2024, arXiv
2401.00595; moved options, and the preference for letters, Zheng et al., 2023, arXiv 2309.03882.
"""

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepseek_eval.tasks import mmlu
from deepseek_eval.tasks.task import ChoiceItem, Figure

MISTYPED_SHARE = 0.1
MIN_LETTERS = 4
_KEY_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
NEIGHBORS = {
    key: row[max(0, place - 1) : place] + row[place + 1 : place + 2]
    for row in _KEY_ROWS
    for place, key in enumerate(row)
}
DISTRACTIONS = (
    "The library on the corner opens at nine in the morning.",
    "My neighbour repainted the fence last summer.",
    "A small grey cat was asleep on the windowsill.",
    "The train to the coast leaves from the second platform.",
    "Somebody had left an umbrella in the hallway.",
    "The soup at the new restaurant comes with fresh bread.",
    "It rained for most of the afternoon yesterday.",
    "The children built a tower out of wooden blocks.",
)
INSTRUCTIONS = (
    "Answer the following multiple choice questions about {subject}.",
    "Below are exam questions on {subject}. Each has four options, of which exactly one is correct.",
    "Read each question on {subject} and give the letter of the right option.",
    "Questions on {subject} follow. Pick the best answer to each from the options A, B, C and D.",
)
_SPEAKS_OF_OPTIONS = re.compile(
    r"\b(?:all|none|both|neither|any|either|some|each|two|three)\s+(?:of\s+)?(?:the\s+)?(?:above|these|those|them|options"
    r"|choices|answers|others?)\b|\babove\b|\bbelow\b|\b(?-i:[A-D])\s*(?:and|or|nor|&|,)\s*(?-i:[A-D])\b"
    r"|\b(?:options?|choices?|answers?)\s*\(?(?-i:[A-D])\b|\([a-d]\)|^\s*(?:both|neither|all|none)\s*\.?\s*$",
    re.IGNORECASE,
)


def build_items(num_fewshot: int, limit: int | None, data_path: str | Path | None) -> Iterator[ChoiceItem]:
    """Yield each question as it stands, then its changed forms.

    Args:
        num_fewshot: As `mmlu.build_items`; shots stay as they are.
        limit: At most this many questions per subject.
        data_path: As `mmlu.build_items`.
    """
    for original in mmlu.build_items(num_fewshot, limit, data_path):
        letters = tuple(range(len(mmlu.LETTERS)))
        yield replace(original, answers=letters, facts={"variant": "original", "question": original.id})
        yield from _change(original)


def _change(item: ChoiceItem) -> Iterator[ChoiceItem]:
    # The question is what stands between the last blank line and "Answer:"; built anew from its row.
    row, prefix = item.facts["row"], item.context
    forms = []
    mistyped = mistype(row["question"], _draw(item.id, "typos"))
    if mistyped != row["question"]:
        forms.append(("typos", prefix + mmlu.format_question({**row, "question": mistyped}), None))
    if not speaks_of_options(row["choices"]):
        for shift in range(1, len(row["choices"])):
            order = tuple((place + shift) % len(row["choices"]) for place in range(len(row["choices"])))
            moved = {**row, "choices": [row["choices"][index] for index in order]}
            forms.append((f"reordered/{shift}", prefix + mmlu.format_question(moved), order))
    distracted = {**row, "question": f"{_draw(item.id, 'distraction').choice(DISTRACTIONS)} {row['question'].strip()}"}
    forms.append(("distraction", prefix + mmlu.format_question(distracted), None))
    number = _draw(item.id, "instruction").randrange(len(INSTRUCTIONS))
    shots = prefix.split("\n\n", 1)[1]
    instruction = INSTRUCTIONS[number].format(subject=item.group.replace("_", " "))
    forms.append(("instruction", f"{instruction}\n\n{shots}{mmlu.format_question(row)}", None))
    for name, prompt, order in forms:
        yield ChoiceItem(
            id=f"{item.id}#{name}",
            prompt=prompt,
            context=f"{instruction}\n\n{shots}" if name == "instruction" else prefix,
            choices=item.choices,
            target=item.target,
            # Questions of one group share their first tokens, which another instruction changes.
            group=f"{item.group}#{name}{number}" if name == "instruction" else item.group,
            answers=order or tuple(range(len(item.choices))),
            facts={"variant": name.split("/")[0], "question": item.id},
        )


def _draw(item_id: str, purpose: str) -> random.Random:
    """A generator of its own for each question and purpose, the same on every machine."""
    return random.Random(int.from_bytes(hashlib.sha256(f"{purpose}\n{item_id}".encode()).digest()[:8], "big"))


def mistype(text: str, generator: random.Random) -> str:
    """Return the text with one typing error in every tenth word of at least four letters, at least one.

    The first and the last letter stay, as in human misspellings that are still read with ease.

    Args:
        text: Any text.
        generator: What draws.
    """
    words = list(re.finditer(rf"[A-Za-z]{{{MIN_LETTERS},}}", text))
    if not words:
        return text
    chosen = generator.sample(words, max(1, round(MISTYPED_SHARE * len(words))))
    for match in sorted(chosen, key=lambda match: -match.start()):
        text = text[: match.start()] + _mistype_word(match[0], generator) + text[match.end() :]
    return text


def _mistype_word(word: str, generator: random.Random) -> str:
    place = generator.randrange(1, len(word) - 1)
    letter = word[place]
    kind = generator.choice(("swap", "drop", "add", "key"))
    if kind == "swap" and place + 1 < len(word) - 1 and word[place + 1] != letter:
        return word[:place] + word[place + 1] + letter + word[place + 2 :]
    if kind == "drop":
        return word[:place] + word[place + 1 :]
    near = generator.choice(NEIGHBORS[letter.lower()])
    near = near.upper() if letter.isupper() else near
    return word[:place] + near + word[place + (kind != "add") :]


def speaks_of_options(choices: Sequence[str]) -> bool:
    """Tell whether an option names others by their position, so that moving them would change its meaning.

    Args:
        choices: The options' texts.
    """
    return any(_SPEAKS_OF_OPTIONS.search(choice) for choice in choices)


def metric_inputs(items: Sequence[ChoiceItem], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what `robustness` takes.

    Args:
        items: The questions in all their forms.
        rows: Their answers.
    """
    # Answers taken over from mmlu have no letter of their own; there letter and answer are the same.
    return {
        "predictions": [row["prediction"] for row in rows],
        "references": [row["target"] for row in rows],
        "variants": [item.facts["variant"] for item in items],
        "questions": [item.facts["question"] for item in items],
        "letters": [row.get("choice", row["prediction"]) for row in rows],
        "gold_letters": [item.answers.index(item.target) for item in items],
    }


TASK = replace(
    mmlu.TASK,
    name="mmlu_robust",
    has_chat=False,
    build_items=build_items,
    label="MMLU, perturbed",
    figures=(
        Figure("acc_original", "accuracy, unperturbed", chance=0.25, is_share=True),
        Figure("acc_perturbed", "accuracy, all perturbations", chance=0.25, is_share=True),
        Figure("worst_difference", "worst change of accuracy"),
        Figure("max_flip_rate", "largest share of flipped answers", higher_is_better=False, is_share=True),
        Figure("rstd", "spread of recall over letters (RStd)", higher_is_better=False),
    ),
    measures="robustness",
    is_safety=True,
    categories={},
    metric="robustness",
    metric_inputs=metric_inputs,
    shares_answers_with="mmlu",
    does_not_show="Attacks that search for the worst change (these are drawn blindly), and tasks other than a choice "
    "of four; a model at chance cannot fall, so read the flip rate too.",
)
