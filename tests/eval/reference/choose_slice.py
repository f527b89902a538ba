"""Writes ``slice.json``: ten questions per subject, those whose id has the smallest SHA-256. 570 in all."""

import hashlib
import json
from collections import defaultdict
from pathlib import Path

from deepseek_eval.tasks.mmlu import TASK

PER_SUBJECT = 10


def choose() -> list[str]:
    groups = defaultdict(list)
    for item in TASK.build_items(0, None, None):
        groups[item.group].append(item.id)
    chosen = []
    for names in groups.values():
        smallest = set(sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:PER_SUBJECT])
        chosen += [name for name in names if name in smallest]
    return chosen


if __name__ == "__main__":
    (Path(__file__).resolve().parent / "slice.json").write_text(json.dumps(choose(), indent=0) + "\n")
