"""The settings of the `data` command, kept apart so that reading them imports none of what cleans."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

from deepseek_training.recipes.bounds import BoundedSettings
from deepseek_training.recipes.loading import build_recipe, setting

FILTERS = ("repair", "language", "boilerplate", "quality", "toxicity", "contamination", "personal_data", "duplicates")


@dataclasses.dataclass(kw_only=True)
class SourceSettings:
    """One source of a `DataRecipe`."""

    path: str = setting(help="Embedded name, file, folder, datasets directory or Hub id.")
    name: str | None = setting(None, help="What rows and counts call it; null: the last part of the path.")
    column: str | None = setting(None, help="Column that holds the text; null: text.")
    document_column: str | None = setting(
        None, help="Column that tells which document a row is a part of, so that a document is not split; null: none."
    )
    license: str = setting("not stated", help="Its license, for the data card.")
    url: str = setting("not stated", help="Where it comes from, for the data card.")
    role: Literal["train", "validation"] | None = setting(
        None, help="Put all of it into one split; null: its column 'split', else validation_share."
    )


@dataclasses.dataclass(kw_only=True)
class DataRecipe(BoundedSettings):
    """The settings of `data`."""

    seed: int = setting(0, help="Seed of the permutations that find near-duplicates.")
    sources: list[dict[str, Any]] = setting(  # noqa: RUF009
        help="What to read: a list of mappings with path, and name, column, document_column, license, url and role."
    )
    encoding: str = setting("utf-8", help="Encoding of text, JSON Lines and CSV files.")
    filters: list[str] = setting(list(FILTERS), help=f"What to apply, of {', '.join(FILTERS)}; always in this order.")  # noqa: RUF009
    languages: list[str] = setting([], help="ISO 639-1 codes of languages to keep; empty: all.")  # noqa: RUF009
    trusted: str | None = setting(
        None,
        help="Clean text that the quality thresholds are fitted to, named as a source; null: the sources themselves, "
        "where what lies far outside of the bulk is dropped.",
    )
    trusted_column: str | None = setting(None, help="Column that holds the trusted text; null: text.")
    fit_documents: int = setting(2000, help="Documents of each source that thresholds are fitted to, at least 50.")
    fence: float = setting(
        3.0, help="A figure is too far out beyond this many interquartile ranges from the quartile; above 0."
    )
    max_trusted_loss: float = setting(
        0.01, help="Share of trusted documents that the quality thresholds may drop together, in (0, 0.5)."
    )
    max_unsafe_share: float = setting(
        0.4, help="A document with a larger share of unsafe sentences is toxic, in [0, 1]."
    )
    benchmarks: list[str] | None = setting(  # noqa: RUF009
        None, help="Tasks of evaluate whose items must not be in the text; null: all that are embedded."
    )
    benchmark_data: dict[str, Any] = setting({}, help="Task to folder, file or Hub id, where it is not embedded.")  # noqa: RUF009
    max_item_share: float = setting(
        0.5, help="A text that holds this share of the word n-grams of a benchmark item leaks it, in (0, 1]."
    )
    mask_names: bool = setting(False, help="Mask names of persons behind a title or a label, too.")
    near_duplicates: float = setting(
        0.6, help="Jaccard similarity of word 5-grams from which two texts are near-duplicates, in (0, 1]."
    )
    validation_share: float = setting(0.1, help="Share of documents held out, by a hash of the document, in [0, 1).")
    format: Literal["jsonl.gz", "parquet"] = setting("jsonl.gz", help="Format of the shards: jsonl.gz or parquet.")
    shard_megabytes: float = setting(64.0, help="Text of one shard, in MB, above 0.")
    tokenizer: str | None = setting(
        None, help="Folder or Hub id of a tokenizer whose tokens are counted and cached for training; null: none are."
    )
    num_samples: int = setting(5, help="Samples kept of what each filter dropped or changed, per reason.")

    def __post_init__(self) -> None:
        self.require("sources", bool(self.sources), "at least one source")
        self._check_names("filters", FILTERS)
        self.filters = [name for name in FILTERS if name in self.filters]
        self.require("fit_documents", self.fit_documents >= 50, "at least 50")
        self.require("fence", self.fence > 0, "above 0")
        self.require("max_trusted_loss", 0 < self.max_trusted_loss < 0.5, "in (0, 0.5)")
        self.require("max_unsafe_share", 0 <= self.max_unsafe_share <= 1, "in [0, 1]")
        for name in ("max_item_share", "near_duplicates"):
            self.require(name, 0 < getattr(self, name) <= 1, "in (0, 1]")
        self.require("validation_share", 0 <= self.validation_share < 1, "in [0, 1)")
        self.require("shard_megabytes", self.shard_megabytes > 0, "above 0")
        self.require("num_samples", self.num_samples >= 0, "at least 0")
        self.require("seed", 0 <= self.seed < 2**32, "in [0, 2**32)")
        self._refuse_without("language", "languages")
        self._refuse_without("quality", "trusted", "trusted_column")
        self._refuse_without("contamination", "benchmarks", "benchmark_data")
        self._refuse_without("personal_data", "mask_names")
        self.require("trusted_column", not self.trusted_column or bool(self.trusted), "null with trusted null")
        names = [str(source.name) for source in self.source_settings]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"sources: got the name {twice[0]} twice, expected different names; set name")

    @property
    def source_settings(self) -> list[SourceSettings]:
        """The sources, checked, each with a name.

        Raises:
            ValueError: A key is unknown or missing, or a value of another type.
        """
        found = [
            build_recipe(source, SourceSettings, source=f"sources[{number}]")
            for number, source in enumerate(self.sources)
        ]
        return [
            dataclasses.replace(source, name=source.name or source.path.rstrip("/").rpartition("/")[2].split(".")[0])
            for source in found
        ]

    def benchmark_names(self, embedded: Iterable[str]) -> list[str]:
        """Return the tasks whose items must not be in the text.

        Args:
            embedded: Every task that there is.
        """
        return list(dict.fromkeys([*embedded, *self.benchmark_data])) if self.benchmarks is None else self.benchmarks

    def _check_names(self, setting_name: str, known: tuple[str, ...]) -> None:
        for name in getattr(self, setting_name):
            if name not in known:
                raise ValueError(f"{setting_name}: got {name!r}, expected names of {', '.join(known)}")

    def _refuse_without(self, filter_name: str, *names: str) -> None:
        """A setting of a filter that is not applied would have no effect."""
        for name in names:
            self.require(name, filter_name in self.filters or not getattr(self, name), f"none without {filter_name}")
