"""MMLU: 57 subjects of four-choice questions, formatted as lm-evaluation-harness 0.4.13 does by default.

0-shot unless asked otherwise, as there; with shots, the first of each subject's five development
questions; ``limit`` counts questions per subject. The task ``mmlu_hendrycks`` writes the original code's format: a
second space before the subject, and shots dropped from the end until the prompt fits, where the harness cuts tokens.

Reference: Hendrycks et al., 2021, "Measuring Massive Multitask Language Understanding", arXiv 2009.03300.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from deepseek_eval.tasks.row import Row
from deepseek_eval.tasks.rows import check_folder, read_rows
from deepseek_eval.tasks.task import ChoiceItem, DataSet, Figure, Task
from deepseek_records.results import Benchmark, Published

LETTERS = ("A", "B", "C", "D")
MAX_SHOTS = 5

_CATEGORIES = {
    "stem": "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science "
    "college_mathematics college_physics computer_security conceptual_physics electrical_engineering "
    "elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science "
    "high_school_mathematics high_school_physics high_school_statistics machine_learning",
    "humanities": "formal_logic high_school_european_history high_school_us_history high_school_world_history "
    "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory "
    "professional_law world_religions",
    "social_sciences": "econometrics high_school_geography high_school_government_and_politics "
    "high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality "
    "professional_psychology public_relations security_studies sociology us_foreign_policy",
    "other": "business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing "
    "medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology",
}
SUBJECT_CATEGORIES = {subject: category for category, names in _CATEGORIES.items() for subject in names.split()}


def format_question(row: dict[str, Any]) -> str:
    """Return question, lettered choices and ``Answer:``.

    Args:
        row: ``question`` and four ``choices``.
    """
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question'].strip()}{choices}\nAnswer:"


def format_shots(subject: str, shots: Sequence[dict[str, Any]], style: str = "lm_eval") -> str:
    """Return the description and the answered examples that stand before a question.

    Args:
        subject: The subject's file name, for example ``abstract_algebra``.
        shots: Development rows, already cut to the number wanted.
        style: ``lm_eval`` or ``hendrycks``.
    """
    name = subject.replace("_", " ")
    about = f" {name}" if style == "hendrycks" else name
    description = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    return description + "".join(f"{format_question(row)} {LETTERS[row['answer']]}\n\n" for row in shots)


def format_turns(subject: str, shots: Sequence[dict[str, Any]]) -> tuple[dict[str, str], ...]:
    """Return what `format_shots` does as turns: the description is the system's, each shot asked and answered.

    Args:
        subject: As for `format_shots`.
        shots: Likewise.
    """
    turns = [{"role": "system", "content": format_shots(subject, ())}]
    for row in shots:
        turns += [
            {"role": "user", "content": format_question(row)},
            {"role": "assistant", "content": LETTERS[row["answer"]]},
        ]
    return tuple(turns)


def build_items(
    num_fewshot: int, limit: int | None, data_path: str | Path | None, style: str = "lm_eval"
) -> Iterator[ChoiceItem]:
    """Yield the questions, subject by subject in the file's order.

    Args:
        num_fewshot: Shots from the development split, 0 to 5.
        limit: At most this many questions per subject (the first ones, as lm-eval's ``--limit``).
        data_path: A folder with ``mmlu_test.jsonl[.gz]`` and ``mmlu_dev.jsonl[.gz]``; None for the embedded ones.
        style: ``lm_eval`` or ``hendrycks``.

    Raises:
        ValueError: A row that is not such a question, more shots asked for than the development split has, or a file
            where a folder is wanted.
    """
    if not 0 <= num_fewshot <= MAX_SHOTS:
        raise ValueError(f"num_fewshot: got {num_fewshot} for mmlu, expected 0 to {MAX_SHOTS}")
    check_folder(data_path, "mmlu_test and mmlu_dev")
    shots_by_subject: dict[str, list[Row]] = defaultdict(list)
    for row in read_rows("mmlu_dev", data_path) if num_fewshot else ():
        _check(row)
        shots_by_subject[row["subject"]].append(row)
    seen: dict[str, int] = defaultdict(int)
    turns: dict[str, tuple[dict[str, str], ...]] = {}  # shared by a subject's questions
    for row in read_rows("mmlu_test", data_path):
        _check(row)
        subject = row["subject"]
        if len(shots_by_subject[subject]) < num_fewshot:
            raise ValueError(
                f"{row.where}: num_fewshot: got {num_fewshot}, expected at most {len(shots_by_subject[subject])}; "
                f"mmlu_dev has no more examples of {subject!r}"
            )
        index = seen[subject]
        seen[subject] += 1
        if limit is not None and index >= limit:
            continue
        question = format_question(row)
        if subject not in turns:
            turns[subject] = format_turns(subject, shots_by_subject[subject][:num_fewshot])
        contexts = [
            format_shots(subject, shots_by_subject[subject][:number], style)
            for number in range(num_fewshot, -1 if style == "hendrycks" else num_fewshot - 1, -1)
        ]
        yield ChoiceItem(
            id=f"{subject}/{index}",
            prompt=contexts[0] + question,
            context=contexts[0],
            shorter_prompts=tuple(context + question for context in contexts[1:]),
            choices=tuple(f" {letter}" for letter in LETTERS),
            target=row["answer"],
            group=subject,
            facts={"row": row},
            chat_context=turns[subject],
        )


def _check(row: Row) -> None:
    row.text("subject")
    row.text("question")
    row.texts("choices", len(LETTERS), len(LETTERS))
    row.index("answer", len(LETTERS))


DATA = DataSet(
    name="cais/mmlu",
    label="MMLU",
    split="test",
    license="MIT",
    source="https://github.com/hendrycks/test",
    num_questions=14042,
    questions_hash="c9037c82397a585c2183395b280fdca0b3d3043c2b3587e9b5bef23fc7595c7f",
    benchmark=Benchmark(hub_id="cais/mmlu", name="MMLU", config="all"),
)

TASK = Task(
    name="mmlu",
    kind="choice",
    build_items=build_items,
    data=DATA,
    figures=(
        Figure(
            "acc",
            "accuracy",
            chance=1 / len(LETTERS),
            is_share=True,
            published=(
                Published(by="DeepSeek-V3 base", value=0.871, remark="5-shot"),
                Published(by="the article", value=0.823),
            ),
        ),
    ),
    measures="knowledge",
    categories=SUBJECT_CATEGORIES,
    max_fewshot=MAX_SHOTS,
    has_chat=True,
)

HENDRYCKS_TASK = replace(
    TASK,
    name="mmlu_hendrycks",
    label="MMLU, original format",
    build_items=partial(build_items, style="hendrycks"),
    num_fewshot=MAX_SHOTS,
    has_chat=False,
)
