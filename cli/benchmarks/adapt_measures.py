"""What ``deepseek-moe bench adapt`` measures of a model: held-out text by source, the long tail, and tasks."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_eval.harness import evaluate_model
from deepseek_eval.tasks.rows import read_rows as read_questions
from deepseek_records.loading import load_model, load_tokenizer
from deepseek_training.continual.held_out_units import HeldOutUnits
from deepseek_training.data.packing import cut_to_share
from deepseek_training.data.texts import EMBEDDED, data_name, load_texts, read_rows
from deepseek_training.knowledge.frequency_loss import TailCounts, TailText, measure_tail

# MMLU's subjects that the two embedded domains speak of.
SUBJECTS = {
    "medical": "anatomy clinical_knowledge college_biology college_medicine medical_genetics professional_medicine",
    "economic": "econometrics high_school_macroeconomics high_school_microeconomics management marketing "
    "professional_accounting",
}
_FIELD_OF = {subject: field for field, names in SUBJECTS.items() for subject in names.split()}


@dataclasses.dataclass(frozen=True)
class MeasuredModel:
    """What was found.

    Attributes:
        bits: By held-out source, bits of each of its units.
        num_bytes: Their UTF-8 bytes.
        languages: By source.
        tail: By domain and kind, what `measure_tail` counts.
        hits: By task (MMLU by field) and question, 0 or 1.
        figures: By task, the figures that know no right and wrong, with errors as ``<name>_stderr``.
    """

    bits: dict[str, list[float]]
    num_bytes: dict[str, list[float]]
    languages: dict[str, str]
    tail: dict[str, dict[str, TailCounts]]
    hits: dict[str, dict[str, float]]
    figures: dict[str, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        kept = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        kept["tail"] = {
            domain: {kind: {key: array.tolist() for key, array in vars(one).items()} for kind, one in kinds.items()}
            for domain, kinds in self.tail.items()
        }
        return kept

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "MeasuredModel":
        """Return what `to_json` wrote."""
        tail = {
            domain: {
                kind: TailCounts(**{key: np.array(rows) for key, rows in one.items()}) for kind, one in kinds.items()
            }
            for domain, kinds in value["tail"].items()
        }
        return cls(**{**value, "tail": tail})


@dataclasses.dataclass
class Measures:
    """How every model is measured, on the same text and questions.

    Args:
        model: Whose tokenizer counts.
        texts: Held-out texts, named as for ``adapt``.
        domains: Those of them whose long tail is looked at.
        eval_bytes: UTF-8 bytes of each source that are scored.
        sequence_length: Tokens that a model sees at once.
        tasks: Of ``evaluate``.
        limit: As for ``evaluate``.
        data: As for ``evaluate``.
        folder: Where the chosen questions are written.
    """

    model: str
    texts: Sequence[str]
    domains: Sequence[str]
    eval_bytes: int
    sequence_length: int
    tasks: Sequence[str]
    limit: Any
    data: Any
    folder: Path

    def __post_init__(self) -> None:
        tokenizer = load_tokenizer(self.model)
        self.sets: dict[str, HeldOutUnits] = {}
        self.languages: dict[str, str] = {}
        for text in self.texts:
            languages = EMBEDDED[text].languages if text in EMBEDDED else ("not stated",)
            for name, documents in held_out_sources(text).items():
                self.sets[name] = HeldOutUnits.prepare(name, documents, tokenizer, self.eval_bytes)
                self.languages[name] = ", ".join(languages)
        self.tails = {
            data_name(one): TailText.prepare(
                load_texts(one), list(cut_to_share(load_texts(one, "validation"), self.eval_bytes))
            )
            for one in self.domains
        }
        if "mmlu" in self.tasks and not (isinstance(self.data, Mapping) and "mmlu" in self.data):
            self.data = {**_by_task(self.data, self.tasks), "mmlu": str(self._write_subjects())}

    def _write_subjects(self) -> Path:
        """MMLU's questions of the two fields, as data of one's own."""
        folder = self.folder / "questions"
        folder.mkdir(parents=True, exist_ok=True)
        source = self.data if isinstance(self.data, str) else None
        rows = [row for row in read_questions("mmlu_test", source and Path(source)) if row["subject"] in _FIELD_OF]
        lines = [json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows]
        (folder / "mmlu_test.jsonl").write_text("".join(lines), encoding="utf-8")
        return folder

    def measure(self, model: str | Path, output: Path, *, has_tasks: bool = True) -> MeasuredModel:
        """Return what a model makes of it all.

        Args:
            model: A checkpoint.
            output: The run folder of the tasks' answers.
            has_tasks: Whether the tasks are asked.
        """
        loaded, tokenizer = load_model(model).eval(), load_tokenizer(str(model))
        length = self.sequence_length
        bits = {
            name: one.measure(loaded, sequence_length=length, batch_size=32).tolist()
            for name, one in self.sets.items()
        }
        tail = {
            name: measure_tail(loaded, tokenizer, text, sequence_length=length) for name, text in self.tails.items()
        }
        hits: dict[str, dict[str, float]] = {}
        figures: dict[str, dict[str, float]] = {}
        if self.tasks and has_tasks:
            scores = evaluate_model(
                model, tasks=list(self.tasks), limit=self.limit, data_path=self.data, output=output, overwrite=True
            )["tasks"]
            for task in self.tasks:
                hits |= _hits(task, output / f"samples_{task}.jsonl")
                figures[task] = {key: value for key, value in scores[task].items() if isinstance(value, int | float)}
        sizes = {name: one.num_bytes.tolist() for name, one in self.sets.items()}
        return MeasuredModel(bits, sizes, self.languages, tail, hits, figures)


def _by_task(data: Any, tasks: Sequence[str]) -> dict[str, str]:
    if data is None:
        return {}
    return dict(data) if isinstance(data, Mapping) else dict.fromkeys(tasks, data)


def held_out_sources(name: str) -> dict[str, list[str]]:
    """Return a text's held-out documents by their source, where its rows have a column of that name.

    Args:
        name: As for ``adapt``.
    """
    source_of = {row["text"]: str(row.get("source") or "") for row in read_rows(name)}
    found: dict[str, list[str]] = defaultdict(list)
    for text in load_texts(name, "validation"):
        found[source_of.get(text, "")].append(text)
    short = data_name(name)
    if len(found) == 1:
        return {short: next(iter(found.values()))}
    return {f"{short}: {source or 'other'}": texts for source, texts in sorted(found.items())}


def _hits(task: str, path: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        field = _FIELD_OF.get(row["id"].split("/")[0])
        name = task if task != "mmlu" or field is None else f"mmlu, {field}"
        if row.get("acc") is not None:
            found[name][row["id"]] = float(row["acc"])
    return found
