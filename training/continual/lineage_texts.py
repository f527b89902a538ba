"""The texts that a model was trained on, as far back as its run folders tell.

An update replays them and holds its gate to what of them is held out.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_records.lineage import source_of
from deepseek_records.run_folder import RunFolder
from deepseek_records.stages import read_stages
from deepseek_training.continual.in_force import base_of, update_of
from deepseek_training.data.corpus import Corpus
from deepseek_training.recipes.text_sources import TextSource, text_sources

logger = logging.getLogger(__name__)
# Stages that train on plain text, and the settings that name it.
_TEXTS = {"pretrain": ("data",), "adapt": ("general_data", "data"), "update": ("data", "general_data")}
_OTHER_DATA = ("sft", "dpo", "align", "grpo")


@dataclass(frozen=True)
class TaughtText:
    """One source that a model has learned from.

    Attributes:
        source: How it is read.
        encoding: Of its files, where the source names none.
        stage: The folder of the stage.
    """

    source: TextSource
    encoding: str
    stage: Path

    @property
    def key(self) -> str:
        """Tells sources apart, whatever column is read: of two the first counts."""
        path = Path(self.source.path)
        return str(path.resolve()) if path.exists() else self.source.path

    def load(self) -> Corpus:
        """Return its documents.

        Raises:
            FileNotFoundError: It is not there any more.
        """
        try:
            return Corpus.read(self.source, self.encoding)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"data: {self.stage} was trained on {self.source.path}, which is not found ({error}); run where it was"
            ) from None


def taught_texts(run: Path, model: Path) -> list[TaughtText]:
    """Return the sources that a run's model has learned from, the first first, each once.

    Args:
        run: The run folder.
        model: The model in force.
    """
    found: dict[str, TaughtText] = {}
    for stage, kind, settings in [*_stages(run, model)][::-1]:
        if kind in _OTHER_DATA:
            logger.warning(
                "update: conversations of %s are neither replayed nor held out; name text like them in general_data",
                stage,
            )
        for name in _TEXTS.get(kind, ()):
            column = settings.get("general_column" if name == "general_data" else "data_column")
            for value in _each(settings.get(name)):
                for source in text_sources(value, name, column):
                    one = TaughtText(source, str(settings.get("encoding", "utf-8")), stage)
                    found.setdefault(one.key, one)
    return list(found.values())


def _each(value: Any) -> list[Any]:
    """One source or mixture, or `update`'s list of names."""
    if value is None:
        return []
    return value if isinstance(value, list) and all(isinstance(one, str) for one in value) else [value]


def _stages(run: Path, model: Path) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """Folder, command and settings of every stage behind a model, the last first."""
    while (update := update_of(run, model)) is not None:
        yield update.path, "update", update.settings
        model = base_of(run, update)
    folder: Path | None = run
    seen = set()
    while folder is not None and folder not in seen and RunFolder(folder).is_finished:
        seen.add(folder)
        (stage,) = read_stages(folder).values()
        yield folder, stage.kind, stage.run.settings
        named = source_of(stage)
        path = Path(named).expanduser().resolve() if named else None  # also through the link to a model in force
        if path is None or not path.exists():
            return
        folder = path.parent if path.name in ("model", "adapter") else path
        if folder.parent.name == "updates":  # a run that began from an updated model
            yield from _stages(folder.parent.parent, folder / "model")
            return
