"""What a run ended with: results, data, checks and samples, as ``summary.json`` holds them.

Every command that finishes a run writes a `Summary` (`RunFolder.finish`), and the card, the report, the closing table
and the upload read it. Each figure that is shown later comes from here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from deepseek_records.energy import Energy
from deepseek_records.results import Benchmark, Published, Result, When
from deepseek_records.typed_json import from_json, to_json

__all__ = [
    "Benchmark",
    "Check",
    "Cleaning",
    "CleaningFilter",
    "CleaningSource",
    "DataUse",
    "Energy",
    "Gain",
    "Published",
    "Result",
    "Sample",
    "Summary",
    "When",
]

Comparison = Literal["<", "<=", ">", ">="]
FORMAT = 2
# Keys of summaries written before the format had a number.
_OLD_DATA_KEYS = {"licence": "license", "language": "languages"}
_HOLDS = {
    "<": lambda value, bound: value < bound,
    "<=": lambda value, bound: value <= bound,
    ">": lambda value, bound: value > bound,
    ">=": lambda value, bound: value >= bound,
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One bar that a run holds itself to.

    Args:
        name: What is demanded, in words.
        value: The figure.
        bound: What it is compared with.
        comparison: How.
        passed: Whether the bar was met.
        metric: The figure's name.
        dataset: What it was measured on.
    """

    name: str
    value: float
    bound: float | None = None
    comparison: Comparison | None = None
    passed: bool
    metric: str | None = None
    dataset: str | None = None

    @classmethod
    def compare(
        cls,
        name: str,
        value: float,
        comparison: Comparison,
        bound: float,
        *,
        metric: str | None = None,
        dataset: str | None = None,
    ) -> "Check":
        """Return the check that ``value comparison bound`` holds.

        Args:
            name: What is demanded, in words.
            value: The figure.
            comparison: How it is compared.
            bound: With what.
            metric: The figure's name.
            dataset: What it was measured on.
        """
        return cls(
            name=name,
            value=value,
            bound=bound,
            comparison=comparison,
            passed=_HOLDS[comparison](value, bound),
            metric=metric,
            dataset=dataset,
        )


@dataclass(frozen=True, kw_only=True)
class CleaningSource:
    """What one source gave to text that was cleaned.

    Args:
        name: As the cleaning's recipe calls it.
        split: Which part.
        license: As the recipe states it.
        source: Where it comes from.
        num_rows: Documents that were kept.
        num_bytes: UTF-8 bytes of their text.
        languages: ISO 639 codes, where they were identified.
    """

    name: str
    split: str | None = None
    license: str = "not stated"
    source: str = "not stated"
    num_rows: int | None = None
    num_bytes: int | None = None
    languages: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CleaningFilter:
    """What one filter did.

    Args:
        name: The filter.
        num_in: Documents that reached it.
        num_dropped: Of these dropped.
    """

    name: str
    num_in: int
    num_dropped: int


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """The run of `deepseek-moe data` that a data set came from, as it was when the data were read.

    Args:
        run: Its folder, which holds the data card.
        sources: What each source gave, by split.
        filters: What each filter did, in order.
    """

    run: str
    sources: tuple[CleaningSource, ...] = ()
    filters: tuple[CleaningFilter, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DataUse:
    """One data set that a run used.

    Args:
        name: An embedded name, the last part of a path, or a Hub id.
        split: Which part.
        used_for: Training or evaluation.
        license: As its source states it.
        source: Where it comes from.
        num_rows: Documents, conversations or questions.
        num_bytes: UTF-8 bytes of text.
        hub_id: Its id on the Hub, where it was read from there.
        languages: ISO 639 codes, where they are known.
        cleaning: What cleaned it, where `deepseek-moe data` did.
    """

    name: str
    split: str | None = None
    used_for: Literal["training", "evaluation"] = "training"
    license: str = "not stated"
    source: str = "not stated"
    num_rows: int | None = None
    num_bytes: int | None = None
    hub_id: str | None = None
    languages: tuple[str, ...] = ()
    cleaning: Cleaning | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One text that a model wrote.

    Args:
        prompt: What it continued or answered.
        completion: What it wrote.
        when: Whether it was written before or after the stage's training.
        step: The step of the training after which it was written, where that is not the last.
    """

    prompt: str
    completion: str
    when: When | None = None
    step: int | None = None


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A difference before to after over the same prompts.

    Args:
        value: Mean over prompts of after minus before.
        stderr_paired: Standard error of the prompts' differences.
        stderr_unpaired: Standard error as if the two had different prompts.
        n: Prompts.
    """

    value: float
    stderr_paired: float | None
    stderr_unpaired: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run ended with.

    Args:
        stage: The command that made it.
        results: The figures, in the order they were measured.
        data: The data sets used.
        checks: The bars it holds itself to.
        samples: Texts it wrote.
        seconds: How long it took.
        model: The model that was evaluated.
        base_model: The model that training started from.
        num_training_tokens: Tokens trained on, over all processes.
        num_parameters: Of a model made here.
        vocab_size: Tokens of its vocabulary.
        replay_share: Share of training blocks that were general text.
        gain: What alignment gained on held-out prompts.
        tokens_per_expert: By MoE layer, the tokens each routed expert got in the last logging window.
        energy: What its process used; None where it was not recorded.
        details: Further values that only the stage itself reads.
    """

    stage: str
    results: tuple[Result, ...] = ()
    data: tuple[DataUse, ...] = ()
    checks: tuple[Check, ...] = ()
    samples: tuple[Sample, ...] = ()
    seconds: float | None = None
    model: str | None = None
    base_model: str | None = None
    num_training_tokens: int | None = None
    num_parameters: int | None = None
    vocab_size: int | None = None
    replay_share: float | None = None
    gain: Gain | None = None
    tokens_per_expert: tuple[tuple[float, ...], ...] = ()
    energy: Energy | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def missed(self) -> tuple[str, ...]:
        """The names of the bars that were not met."""
        return tuple(check.name for check in self.checks if not check.passed)

    def to_json(self) -> dict[str, Any]:
        """Return the object that ``summary.json`` holds."""
        lists: dict[str, Any] = {name: [] for name in ("results", "data", "checks", "samples")}
        return {"format": FORMAT, "stage": self.stage, **lists, **to_json(self)}

    @classmethod
    def from_json(cls, value: dict[str, Any], path: str | Path = "summary.json") -> "Summary":
        """Return the summary that a JSON object holds, also one written before the format had a number.

        Args:
            value: What `json` read.
            path: The file, named in errors.

        Raises:
            ValueError: A value does not fit, in one line that names its place.
        """
        kept = {key: inner for key, inner in value.items() if key != "format"}
        number = value.get("format", 1)
        if number not in (1, FORMAT) or isinstance(number, bool):
            raise ValueError(f"{path}: format: got {number!r}, expected 1 or {FORMAT}; a newer version may read it")
        return from_json(cls, kept if number == FORMAT else _renew(kept), str(path))


def _renew(value: dict[str, Any]) -> dict[str, Any]:
    """A summary without a format's number in today's keys; what it does not know goes to ``details``."""
    known = set(Summary.__dataclass_fields__) - {"details"}
    renewed = {key: inner for key, inner in value.items() if key in known}
    renewed.setdefault("stage", "")
    if isinstance(renewed.get("data"), list):
        renewed["data"] = [_renew_data(row) for row in renewed["data"]]
    return {**renewed, "details": {key: inner for key, inner in value.items() if key not in known}}


def _renew_data(row: Any) -> Any:
    if not isinstance(row, dict):
        return row
    renewed = {_OLD_DATA_KEYS.get(key, key): inner for key, inner in row.items()}
    if isinstance(renewed.get("languages"), str):
        renewed["languages"] = [renewed["languages"]]
    return renewed
