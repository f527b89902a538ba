"""CrowS-Pairs: 1,508 pairs of sentences that differ in the group spoken of; which one does the model find likelier?

Format and figures are those of lm-evaluation-harness 0.4.13's ``crows_pairs_english``: each whole sentence after the
BOS (else EOS) token, summed log-likelihood. The paper scores masked models and leaves the differing words
out, so its figures are others; and the data is CC BY-SA, hence not shipped: it is read from a path or the Hub.

Reference: Nangia et al., 2020, "CrowS-Pairs: A Challenge Dataset for Measuring Social Biases in Masked Language
Models", arXiv 2010.00133.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from deepseek_eval.tasks.rows import read_rows
from deepseek_eval.tasks.task import ChoiceItem, DataSet, Figure, Task

NAMES = ("crows_pairs", "crows_pairs_anonymized")
WHERE = (
    "its license is CC BY-SA 4.0; pass --data crows_pairs=PATH with crows_pairs_anonymized.csv from "
    "https://github.com/nyu-mll/crows-pairs (data/), or --data crows_pairs=jannalu/crows_pairs_multilingual:english "
    "for the Hub"
)
COLUMNS = ("sent_more", "sent_less", "bias_type")


def build_items(num_fewshot: int, limit: int | None, data_path: str | Path | None) -> Iterator[ChoiceItem]:
    """Yield the pairs in order, the more stereotyping sentence first.

    Args:
        num_fewshot: Ignored: a sentence stands alone.
        limit: At most this many pairs, the first ones.
        data_path: A folder with ``crows_pairs_anonymized.csv`` or ``crows_pairs.jsonl[.gz]``, the file, or a Hub id.

    Raises:
        FileNotFoundError: No data was given.
        ValueError: A column is missing.
    """
    for index, row in enumerate(islice(read_rows(NAMES, data_path, where=WHERE), limit)):
        for name in COLUMNS:
            row.text(name)
        yield ChoiceItem(
            id=f"crows_pairs/{index}",
            prompt="",
            choices=(row["sent_more"], row["sent_less"]),
            target=None,
            group=row["bias_type"],
            facts={"direction": row.get("stereo_antistereo") or "not stated"},
        )


def metric_inputs(items: Sequence[ChoiceItem], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what `stereotype_preference` takes.

    Args:
        items: The pairs.
        rows: Their answers.
    """
    return {
        "predictions": [row["loglikelihoods"] for row in rows],
        "references": [item.group for item in items],
        "directions": [item.facts["direction"] for item in items],
    }


TASK = Task(
    name="crows_pairs",
    kind="continuation",
    build_items=build_items,
    data=DataSet(
        name="nyu-mll/crows_pairs",
        label="CrowS-Pairs",
        split="test",
        license="CC-BY-SA-4.0",
        source="https://github.com/nyu-mll/crows-pairs",
        num_questions=1508,
        questions_hash="88e9b513ec11c0c86f845f86d328e080ca327a0dba8076072f71d6bd5fd3de19",
    ),
    figures=(
        Figure(
            "pct_stereotype",
            "share that prefers the stereotype (0.5 is ideal)",
            chance=0.5,
            higher_is_better=None,
            is_share=True,
        ),
        Figure("likelihood_diff", "mean difference of log-likelihoods", higher_is_better=None),
    ),
    measures="bias",
    is_safety=True,
    metric="stereotype_preference",
    metric_inputs=metric_inputs,
    does_not_show="What the model writes or decides, for only sentences are compared; many pairs are noisy (Blodgett "
    "et al., 2021), and 0.5 is also what a model gives that knows nothing.",
)
