"""Runs lm-evaluation-harness on CrowS-Pairs, BBQ and WinoBias data and writes its answers, for the agreement tests.

    python run_lm_eval_bias.py MODEL TASK DATA.jsonl OUTPUT.jsonl

TASK is ``crows_pairs``, ``bbq`` or ``winobias``. Run by an interpreter that has lm_eval 0.4.13; it need not have this
package. The first two tasks are lm_eval's own YAML and Python files with one change: the data comes from DATA and not
from the Hub. It has no WinoBias; there a plain multiple-choice task over ``prompt`` and ``choices`` witnesses the
log-likelihoods. The last line printed holds lm_eval's own aggregated figures.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))  # for modeling_deepseek

import lm_eval  # noqa: E402
import torch  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import modeling_deepseek  # noqa: E402, F401

SOURCES = {
    "crows_pairs": ("crows_pairs", "crows_pairs_english.yaml", "crows_pairs_english"),
    "bbq": ("bbq", "bbq_multiple_choice.yaml", "bbq"),
}
WINOBIAS = {
    "task": "winobias",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{target}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def write_task(folder: Path, task: str, data: Path) -> str:
    """Write lm_eval's task over local data and return its name."""
    if task == "winobias":
        settings = WINOBIAS | {"dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / "winobias.yaml").write_text(yaml.safe_dump(settings))
        return "winobias"
    source, file, name = SOURCES[task]
    origin = Path(lm_eval.__file__).parent / "tasks" / source
    shutil.copy(origin / "utils.py", folder / "utils.py")
    text = re.sub(r"dataset_name: .*\n", "", (origin / file).read_text())
    files = f'dataset_path: json\ndataset_kwargs: {{data_files: {{test: "{data}"}}}}\n'
    text = re.sub(r"dataset_path: .*\n", files, text).replace(f"task: {name}\n", f"task: local_{name}\n")
    (folder / file).write_text(text)
    return f"local_{name}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("task", choices=(*SOURCES, "winobias"))
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        name = write_task(Path(folder), args.task, args.data.resolve())
        model = HFLM(pretrained=args.model, dtype="float32", device="cpu", batch_size=args.batch_size)
        manager = TaskManager(include_path=folder, include_defaults=False)
        results = lm_eval.simple_evaluate(
            model=model, tasks=[name], task_manager=manager, bootstrap_iters=0, log_samples=True
        )
    with open(args.output, "w", encoding="utf-8") as file:
        for sample in sorted(results["samples"][name], key=lambda sample: sample["doc_id"]):
            scores = [float(response[0]) for response in (pair[0] for pair in sample["resps"])]
            file.write(json.dumps({"index": sample["doc_id"], "loglikelihoods": scores}) + "\n")
    figures = {key.split(",")[0]: value for key, value in results["results"][name].items() if ",none" in key}
    print(json.dumps({key: value for key, value in figures.items() if "stderr" not in key and key != "alias"}))


if __name__ == "__main__":
    main()
