"""The answers of one task on disk: appended as they come, read back by a run that goes on where it stopped.

Called by ``harness.py`` and ``runners/text.py``. A task may take over the answers of another task of the
same run, where both ask the same question (long_tail and mmlu_robust ask MMLU's), so that nothing is asked twice.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from deepseek_eval.questions import hash_question
from deepseek_eval.tasks.task import Task
from deepseek_records.run_folder import RunFolder, write_text


class AnswerFile:
    """The answers of one task on disk, appended as they come and read back by a resumed run.

    Args:
        run: The run folder.
        task: The task, whose name names the files.
        items: The questions, whose hashes are written beside the answers.
    """

    def __init__(self, run: RunFolder, task: Task, items: Sequence[Any]) -> None:
        self._hashes = {item.id: hash_question(item) for item in items}
        self.final_path = run.path / f"samples_{task.name}.jsonl"
        self.partial_path = run.path / f"samples_{task.name}.partial.jsonl"
        self.rows: dict[tuple[str, int], dict[str, Any]] = {}
        paths = [self.final_path, self.partial_path]
        if task.shares_answers_with is not None:
            paths.insert(0, run.path / f"samples_{task.shares_answers_with}.jsonl")
        for path in paths:
            if path.is_file():
                self.rows |= {self.key(row): row for row in _read_whole_lines(path)}

    @staticmethod
    def key(row: dict[str, Any]) -> tuple[str, int]:
        """Return what tells an answer apart: its item and the number of its sample.

        Args:
            row: An answer.
        """
        return row["id"], row.get("sample", 0)

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write answers that are not there yet.

        Args:
            rows: Answers, each with its item's ``id``.
        """
        with open(self.partial_path, "a", encoding="utf-8") as file:
            for row in rows:
                if self.key(row) not in self.rows:
                    self.rows[self.key(row)] = row
                    file.write(json.dumps(row) + "\n")

    def finish(self, rows: list[dict[str, Any]]) -> None:
        """Write the final file and drop the partial one.

        Args:
            rows: All answers in the items' order.
        """
        write_text(self.final_path, "".join(json.dumps(self._with_hash(row)) + "\n" for row in rows))
        self.partial_path.unlink(missing_ok=True)

    def _with_hash(self, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "question_hash": self._hashes[row["id"]]}


def _read_whole_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file whose last line may have been cut short; such a line is dropped from the file too."""
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(path, whole)
    return [json.loads(line) for line in whole.splitlines()]
