"""The run folder: what every command writes, and how it is read back.

Every command of ``deepseek-moe`` works in one folder::

    recipe.yaml        the resolved settings
    environment.json   versions, seed, commit, command line, machine, start time
    inputs.json        hashes of the data, the model and the tokenizer it was begun with
    metrics.jsonl      one JSON object a line, as training logs
    checkpoints/       what a resumed run starts from
    model/             the finished model and its tokenizer
    plots/             pictures
    summary.json       results, data and checks; written last, so its presence means the run is whole

``training`` and ``eval`` write it, ``model_cards`` and ``cli`` read it. A run is finished if and only if
``summary.json`` exists, and that file appears by an atomic rename; anything else in the folder may be half-written.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import yaml

from deepseek_records.energy import EnergyMeter
from deepseek_records.environment import Environment, describe_environment
from deepseek_records.json_files import read_object
from deepseek_records.output_paths import check_output, make_output
from deepseek_records.run_files import (
    ENVIRONMENT_FILE,
    INPUTS_FILE,
    LOCK_FILE,
    METRICS_FILE,
    MODEL_FOLDER,
    RECIPE_FILE,
    SUMMARY_FILE,
    delete_run,
    is_own_run,
)
from deepseek_records.run_lock import lock_run, unlock_run
from deepseek_records.summary import Summary
from deepseek_records.typed_json import from_json, to_json
from deepseek_records.yaml_text import parse_yaml

__all__ = [
    "ENVIRONMENT_FILE",
    "METRICS_FILE",
    "MODEL_FOLDER",
    "RECIPE_FILE",
    "SUMMARY_FILE",
    "RunFolder",
    "write_json",
    "write_text",
]
_HINT = "pass another --output, or --overwrite"


class RunFolder:
    """One run on disk: settings, environment, metrics and, once finished, a summary.

    Args:
        path: The folder. Reading needs it to hold a run; `create` makes one.
        is_resumed: Whether `create` took up a run that was begun before.
    """

    def __init__(self, path: str | Path, *, is_resumed: bool = False) -> None:
        self.path = Path(path)
        self.is_resumed = is_resumed
        self._meter: EnergyMeter | None = None

    @classmethod
    def create(
        cls,
        path: str | Path,
        settings: dict[str, Any],
        *,
        command: str,
        seed: int | None = None,
        overwrite: bool = False,
        free: Collection[str] = (),
    ) -> "RunFolder":
        """Make the folder, or take up an unfinished run with equal settings, and become its owner.

        Args:
            path: The folder to write into.
            settings: The resolved settings, plain YAML values.
            command: The subcommand, for example ``pretrain``.
            seed: The seed of the run, if it has one.
            overwrite: Delete the run that the folder holds; a file that no run writes is never deleted.
            free: Settings that may differ from those the run was begun with.

        Returns:
            The run; `is_resumed` tells whether it was begun before.

        Raises:
            FileExistsError: The folder holds a finished run, a run with other settings, or files of another kind, or
                another process is writing it.
        """
        run = cls(check_output(path))
        if run.path.exists() and any(run.path.iterdir()):
            if not is_own_run(run.path):
                raise FileExistsError(
                    f"output: {run.path} is not empty and holds no run of ours; pass another --output"
                )
            lock_run(run.path)
            if not (overwrite or run.has_only_begun()):
                run._check_resumable(settings, free)
                return cls(path, is_resumed=True)._metered()
            delete_run(run.path, hint="pass another --output")
        lock_run(make_output(run.path))
        write_json(run.path / ENVIRONMENT_FILE, to_json(describe_environment(command, seed)))
        write_text(run.path / RECIPE_FILE, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        return run._metered()

    def _metered(self) -> "RunFolder":
        self._meter = EnergyMeter()
        return self

    @classmethod
    def join(cls, path: str | Path, settings: dict[str, Any], *, free: Collection[str] = ()) -> "RunFolder":
        """Take up, in another process of the same training, what `create` has made or taken up in the first.

        Args:
            path: The folder, which all processes see.
            settings: The resolved settings.
            free: As for `create`.

        Raises:
            FileExistsError: As for `create`, which has then failed in the first process too.
        """
        run = cls(path)
        run._check_resumable(settings, free)
        return run

    @classmethod
    def check(cls, path: str | Path, settings: dict[str, Any], *, free: Collection[str] = ()) -> "RunFolder":
        """Return the run that `create` would make or take up, and write nothing.

        Args:
            path: The folder.
            settings: The resolved settings.
            free: As for `create`.

        Raises:
            FileExistsError: As for `create`.
        """
        run = cls(check_output(path))
        if run.path.exists() and any(run.path.iterdir()) and not run.has_only_begun():
            run._check_resumable(settings, free)
        return run

    def has_only_begun(self) -> bool:
        """Tell whether this is a run that stopped, say at a wrong setting, before it wrote anything worth keeping."""
        names = {path.name for path in self.path.iterdir()}
        return names - {INPUTS_FILE, LOCK_FILE} == {RECIPE_FILE, ENVIRONMENT_FILE}

    def _check_resumable(self, settings: dict[str, Any], free: Collection[str]) -> None:
        if not (self.path / RECIPE_FILE).exists():
            raise FileExistsError(f"output: {self.path} is not empty and holds no run of ours; pass another --output")
        if self.is_finished:
            raise FileExistsError(f"output: {self.path} holds a finished run; {_HINT}")
        old, new = self.settings, settings
        changed = sorted(key for key in old.keys() | new.keys() if key not in free and old.get(key) != new.get(key))
        if changed:
            raise FileExistsError(
                f"output: {self.path} holds another run (it differs in {', '.join(changed)}); {_HINT}"
            )

    def hold_to(self, **inputs: str) -> None:
        """Keep the hashes of what the run is made of, or check those of a run that was begun before.

        Args:
            **inputs: A hash by what it is of, for example ``data``, ``model`` and ``tokenizer``; see
                `deepseek_records.hashes`.

        Raises:
            FileExistsError: The run was begun with something else under the same name.
        """
        kept = self.inputs
        for name, value in inputs.items():
            if kept.get(name, value) != value:
                raise FileExistsError(
                    f"output: {self.path} was begun with another content of {name.replace('_', ' ')} (hash "
                    f"{str(kept[name])[:12]} then, {value[:12]} now); bring the old one back, or {_HINT}"
                )
        if not inputs.items() <= kept.items():
            write_json(self.path / INPUTS_FILE, {**kept, **inputs})

    @property
    def inputs(self) -> dict[str, str]:
        """The hashes that `hold_to` kept; empty for a run of an earlier version."""
        return read_object(self.path / INPUTS_FILE, "run") if (self.path / INPUTS_FILE).is_file() else {}

    @property
    def is_finished(self) -> bool:
        """True once the summary is written."""
        return (self.path / SUMMARY_FILE).is_file()

    @property
    def model_path(self) -> Path:
        """Where the finished model and its tokenizer lie."""
        return self.path / MODEL_FOLDER

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved settings as written at the start."""
        try:
            settings = parse_yaml(self._read(RECIPE_FILE)) or {}
        except ValueError as error:
            raise ValueError(f"run: {self.path / RECIPE_FILE}: got no YAML ({error}), expected the settings") from None
        if not isinstance(settings, dict):
            raise ValueError(f"run: {self.path / RECIPE_FILE} holds {type(settings).__name__}, expected settings")
        return settings

    @property
    def environment(self) -> Environment:
        """Versions, seed, commit, command line and machine."""
        return self.read_environment()

    @property
    def summary(self) -> Summary:
        """What the run ended with."""
        return self.read_summary()

    def read_environment(self, clean: Callable[[Any], Any] = lambda value: value) -> Environment:
        """Return the environment.

        Args:
            clean: Applied to the JSON value first.

        Raises:
            FileNotFoundError: There is none.
            ValueError: The file does not fit, in one line that names the place.
        """
        value = clean(self._read_object(ENVIRONMENT_FILE))
        return from_json(Environment, value, f"run: {self.path / ENVIRONMENT_FILE}")

    def read_summary(self, clean: Callable[[Any], Any] = lambda value: value) -> Summary:
        """Return the summary.

        Args:
            clean: Applied to the JSON value first.

        Raises:
            FileNotFoundError: The run is not finished.
            ValueError: The file does not fit, in one line that names the place.
        """
        return Summary.from_json(clean(self._read_object(SUMMARY_FILE)), f"run: {self.path / SUMMARY_FILE}")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The logged metrics in order, none where nothing was logged; a last line cut short by a kill is left out.

        Raises:
            FileNotFoundError: The folder holds no run.
            ValueError: A line is not an object.
        """
        if (self.path / RECIPE_FILE).is_file() and not (self.path / METRICS_FILE).exists():
            return []
        rows = []
        for line in self._read(METRICS_FILE).splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if not isinstance(row, dict):
                raise ValueError(
                    f"run: {self.path / METRICS_FILE} holds {type(row).__name__} in a line, expected objects"
                )
            rows.append(row)
        return rows

    def _read(self, name: str) -> str:
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise self._lacks(name) from None
        except UnicodeDecodeError as error:
            raise ValueError(
                f"run: {self.path / name}: got bytes that are not UTF-8 (byte {error.start}), expected text"
            ) from None

    def _read_object(self, name: str) -> dict[str, Any]:
        try:
            return read_object(self.path / name, "run")
        except FileNotFoundError:
            raise self._lacks(name) from None

    def _lacks(self, name: str) -> FileNotFoundError:
        return FileNotFoundError(f"run: {self.path} has no {name}; it is not a run folder, or the run is not finished")

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``."""
        with open(self.path / METRICS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def finish(self, summary: Summary) -> Summary:
        """Write the summary with the energy that was used since `create`, which marks the run as finished; return it.

        Args:
            summary: What the run ended with.

        Raises:
            ValueError: A figure in it is NaN or infinite.
        """
        if self._meter is not None:
            summary = dataclasses.replace(summary, energy=self._meter.stop(is_whole=not self.is_resumed))
        value = summary.to_json()
        Summary.from_json(value, f"run: {self.path / SUMMARY_FILE}")  # What is written can be read.
        write_json(self.path / SUMMARY_FILE, value)
        unlock_run(self.path)
        return summary


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either absent, old or whole.

    Args:
        path: The file.
        value: Anything `json` takes; NaN is refused, for other readers choke on it.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text so that the file is either absent, old or whole (a temporary file, synced, then renamed).

    Args:
        path: The file.
        text: Its content, written as UTF-8.
    """
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
