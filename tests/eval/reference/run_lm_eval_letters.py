"""Runs lm-evaluation-harness's MMLU-Pro and MMLU-Redux on made-up rows of their format, for the agreement test.

    python run_lm_eval_letters.py OUTPUT.json.gz

Run by an interpreter that has lm_eval 0.4.13. The tasks are lm_eval's own YAML files with one change: the data comes
from the rows below and not from the Hub. Written are the rows, each prompt, and what the harness's filters and metric
make of a few answers.
"""

import gzip
import json
import sys
import tempfile
from pathlib import Path

import lm_eval
import yaml
from lm_eval.tasks import TaskManager

LETTERS = "ABCDEFGHIJ"
ANSWERS = (
    "First, think. The answer is (B).",
    "the answer is C",
    "Therefore the answer is (J). Question: the answer is (A)",
    "The Answer is (D)",
    "I do not know",
    "B",
    " (c) or Answer: D",
    "",
)
CATEGORIES = ("biology", "computer science", "law")
SUBJECTS = ("astronomy", "high_school_us_history", "virology")


def pro_rows(split: str) -> list[dict]:
    rows = []
    for category in CATEGORIES:
        for index in range(6):
            count = 10 if index != 3 else 4
            answer = (3 * index + len(category)) % count
            cot = f"A: Let's think step by step. Since {index} follows, the answer is ({LETTERS[answer]})."
            rows.append(
                {
                    "question_id": len(rows) + (1000 if split == "validation" else 0),
                    "question": f"  {split} question {index} on {category}:\nwhich one? ",
                    "options": [f" option {number} " for number in range(count)],
                    "answer": LETTERS[answer],
                    "answer_index": answer,
                    "cot_content": cot if split == "validation" else "",
                    "category": category,
                    "src": "made up",
                }
            )
    return rows


def redux_rows() -> list[dict]:
    return [
        {
            "question": f" Question {index} on {subject}?\n",
            "choices": [f"choice {number}" for number in range(4)],
            "answer": (index + len(subject)) % 4,
            "subject": subject,
        }
        for subject in SUBJECTS
        for index in range(4)
    ]


def load(folder: Path, own: Path, template: str, files: dict[str, str], name: str):
    """One of lm_eval's tasks over local files; its YAML stays in a folder with the harness's own helpers."""
    manager_yaml = {**yaml.safe_load(own.read_text().replace("!function", "")), "task": name}
    shared = yaml.safe_load((own.parent / template).read_text().replace("!function", ""))
    merged = {**shared, **manager_yaml, "dataset_path": "json", "dataset_kwargs": {"data_files": files}}
    for key in ("include", "dataset_name", "tag", "group"):
        merged.pop(key, None)
    text = yaml.safe_dump(merged)
    for helper in ("utils.doc_to_text", "utils.fewshot_to_text", "utils.fewshot_to_target"):
        text = text.replace(f": {helper}\n", f": !function {helper}\n")
    text = "\n".join(
        line.replace("process_docs: ", "process_docs: !function ") if "process_docs" in line else line
        for line in text.splitlines()
    )
    (folder / f"{name}.yaml").write_text(text)
    loaded = TaskManager(include_path=str(folder), include_defaults=False).load([name])
    return loaded["tasks"][name]


def describe(task, shots: int) -> list[dict]:
    """Each prompt, and for each answer what the filters take from it and whether it is right."""
    task.set_config("num_fewshot", shots)
    task.build_all_requests(rank=0, world_size=1)
    rows = []
    for instance in task.instances:
        prompt, settings = instance.args
        found = {}
        for answer in ANSWERS:
            text = answer
            for stop in settings["until"]:
                text = text.split(stop)[0]
            instance.resps, instance.filtered_resps = [text], {}
            for ensemble in task._filters:
                ensemble.apply([instance])
            (taken,) = instance.filtered_resps.values()
            score = task.process_results(instance.doc, [taken])["exact_match"]
            found[answer] = [taken, float(score)]
        rows.append({"doc": instance.doc, "prompt": prompt, "until": settings["until"], "answers": found})
    return rows


def main() -> None:
    source = Path(lm_eval.__file__).parent / "tasks"
    result = {"version": "0.4.13", "pro": {}, "redux": [], "pro_rows": {}, "redux_rows": redux_rows()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "utils.py").write_text((source / "mmlu_pro/utils.py").read_text())
        files = {}
        for split in ("test", "validation"):
            result["pro_rows"][split] = pro_rows(split)
            files[split] = str(folder / f"{split}.json")
            Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in pro_rows(split)))
        for category in CATEGORIES:
            own = source / f"mmlu_pro/mmlu_pro_{category.replace(' ', '_')}.yaml"
            for shots in (0, 5):
                task = load(folder, own, "_default_template_yaml", files, f"pro_{category[:3]}_{shots}")
                result["pro"].setdefault(str(shots), []).extend(describe(task, shots))
        for subject in SUBJECTS:
            own = source / f"mmlu-redux/generative/mmlu_{subject}.yaml"
            path = folder / f"{subject}.json"
            path.write_text("".join(json.dumps(row) + "\n" for row in redux_rows() if row["subject"] == subject))
            task = load(folder, own, "_default_template_yaml", {"test": str(path)}, f"redux_{subject}")
            result["redux"].extend(describe(task, 0))
    with gzip.GzipFile(sys.argv[1], "wb", mtime=0) as file:
        file.write(json.dumps(result).encode())


if __name__ == "__main__":
    main()
