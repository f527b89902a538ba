"""The settings of one evaluation, checked before anything is loaded.

Made by ``deepseek-moe evaluate`` and by whoever calls `deepseek_eval.harness.evaluate_model`; read by the harness and
the runners. What a task makes of them (its shots, its limit, where its data lies) is answered here and nowhere else.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_eval.answers.prompt_style import check_style
from deepseek_eval.tasks.catalogue import find_task
from deepseek_eval.tasks.rows import find_source
from deepseek_eval.tasks.task import Task

_AT_LEAST_ONE = ("batch_size", "num_samples", "max_new_tokens")
# A window of one token predicts nothing.
_LEAST_LENGTH = 2


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What to ask a model, and how.

    Args:
        tasks: Names from the catalogue.
        num_fewshot: Shots for tasks that show any (MMLU: 0 to 5, MBPP: 0 to 3); None takes each reference's own (0
            and 3).
        limit: At most this many items (MMLU: per subject), for all tasks or by task name; None for all.
        batch_size: Questions, or prompts, per batch.
        max_length: Tokens that the model sees at once; None takes its context (bits_per_byte: at most 2048 of it).
        max_new_tokens: Length limit of a completion; None takes the task's (HumanEval: 1024).
        num_samples: Completions per problem.
        temperature: 0 is greedy.
        top_p: Nucleus share for sampling.
        prompt_style: ``base`` or ``chat``, through the tokenizer's chat template; refused for a task without one.
        seed: Seed for sampling.
        dtype: As `deepseek_eval.model_loading.load_model` takes it, as are the next four.
        device: Torch device.
        trust_remote_code: Run the checkpoint's own code.
        adapter: PEFT adapter.
        experts_implementation: How MoE layers run.
        tokenizer: Of a model behind a server, which does not tell its own.
        data_path: A folder with the user's own data files, named as the embedded ones; or by task name a folder, a
            file or a Hub id.
        allow_weak_sandbox: Run programs even where the machine offers less than the sandbox's minimum.
    """

    tasks: tuple[str, ...] = ("mmlu", "humaneval")
    num_fewshot: int | None = None
    limit: int | Mapping[str, int] | None = None
    batch_size: int = 32
    max_length: int | None = None
    max_new_tokens: int | None = None
    num_samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    prompt_style: str = "base"
    seed: int = 0
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    adapter: str | None = None
    experts_implementation: str | None = None
    tokenizer: str | None = None
    data_path: str | Path | Mapping[str, str | Path] | None = None
    allow_weak_sandbox: bool = False

    @classmethod
    def of(cls, **values: Any) -> "EvalSettings":
        """Return settings from plain values, lists where tuples are meant.

        Raises:
            ValueError: A name is unknown.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"evaluate: got the unknown setting {name!r}, expected one of {', '.join(known)}")
        if "tasks" in values:
            values["tasks"] = tuple(dict.fromkeys(values["tasks"]))
        return cls(**values)

    def check(self) -> list[Task]:
        """Return the tasks, and refuse settings that fit none of them.

        Raises:
            ValueError: A setting is out of its range, or a task is unknown.
            FileNotFoundError: Data is named that is not there.
        """
        tasks = [find_task(name) for name in self.tasks]
        for name in _AT_LEAST_ONE:
            _check_at_least_one(name, getattr(self, name))
        if isinstance(self.limit, Mapping):
            for name, value in self.limit.items():
                find_task(name)
                _check_at_least_one(f"limit of {name}", value)
        else:
            _check_at_least_one("limit", self.limit)
        if self.max_length is not None and self.max_length < _LEAST_LENGTH:
            raise ValueError(f"max_length: got {self.max_length}, expected {_LEAST_LENGTH} or more")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: got {self.temperature}, expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, expected more than 0, at most 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: got {self.seed}, expected 0 to 2**32 - 1")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"num_samples: got {self.num_samples} with temperature 0, expected 1; greedy completions are all equal"
            )
        self._check_shots(tasks)
        check_style(self.prompt_style, tasks)
        for task in tasks:
            self.source_of(task)
        return tasks

    def _check_shots(self, tasks: list[Task]) -> None:
        if self.num_fewshot is None:
            return
        if self.num_fewshot and not any(task.max_fewshot for task in tasks):
            names = ", ".join(task.name for task in tasks)
            raise ValueError(f"num_fewshot: got {self.num_fewshot}, expected none; {names} shows no examples")
        for task in tasks:
            if task.max_fewshot and not 0 <= self.num_fewshot <= task.max_fewshot:
                raise ValueError(
                    f"num_fewshot: got {self.num_fewshot} for {task.name}, expected 0 to {task.max_fewshot}"
                )

    def shots_of(self, task: Task) -> int:
        """Return how many shots a task shows, which is none for a task that has none."""
        return min(task.max_fewshot, task.num_fewshot if self.num_fewshot is None else self.num_fewshot)

    def limit_of(self, task: Task) -> int | None:
        """Return a task's limit."""
        return self.limit.get(task.name) if isinstance(self.limit, Mapping) else self.limit

    def source_of(self, task: Task) -> str | Path | None:
        """Return where a task's data lies: a path, a Hub id, or None for the embedded data.

        Raises:
            ValueError: Data is named for an unknown task.
            FileNotFoundError: There is no such path.
        """
        source = self.data_path
        if isinstance(source, Mapping):
            for name in source:
                find_task(name)
            source = source.get(task.name)
        return None if source is None else find_source(source)

    def to_recipe(self) -> dict[str, Any]:
        """Return the settings as plain values, as a run folder keeps them."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        limit = dict(self.limit) if isinstance(self.limit, Mapping) else self.limit
        return {**values, "tasks": list(self.tasks), "limit": limit, "data_path": name_data(self.data_path)}


def name_data(data_path: str | Path | Mapping[str, str | Path] | None) -> str | dict[str, str] | None:
    """Return the user's data as a run folder keeps it.

    Args:
        data_path: As `EvalSettings` has it.
    """
    if isinstance(data_path, Mapping):
        return {name: str(source) for name, source in data_path.items()}
    return None if data_path is None else str(data_path)


def _check_at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name}: got {value}, expected 1 or more")
