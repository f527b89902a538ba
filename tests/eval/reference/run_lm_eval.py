"""Runs lm-evaluation-harness on the embedded MMLU and writes its answers, for the agreement tests.

    python run_lm_eval.py MODEL OUTPUT.jsonl.gz --num-fewshot 5 [--ids FILE] [--batch-size 32]

Run by an interpreter that has lm_eval 0.4.13; it need not have this package. The tasks are lm_eval's own YAML files
with one change: the data comes from the files in ``eval/data`` and not from the Hub.
"""

import argparse
import gzip
import hashlib
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))  # for modeling_deepseek

import lm_eval  # noqa: E402
import torch  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import modeling_deepseek  # noqa: E402, F401


def read_rows(name: str) -> list[dict]:
    with gzip.open(ROOT / "eval/data" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_tasks(folder: Path, wanted: set[str] | None) -> dict[str, list[str]]:
    """Write lm_eval's task files over local data; return each subject's question ids in order."""
    source = Path(lm_eval.__file__).parent / "tasks/mmlu/default"
    template = yaml.safe_load((source / "_default_template_yaml").read_text())
    rows, ids = defaultdict(lambda: {"test": [], "dev": []}), defaultdict(list)
    counts = defaultdict(int)
    for row in read_rows("mmlu_test"):
        question_id = f"{row['subject']}/{counts[row['subject']]}"
        counts[row["subject"]] += 1
        if wanted is None or question_id in wanted:
            rows[row["subject"]]["test"].append(row)
            ids[row["subject"]].append(question_id)
    for row in read_rows("mmlu_dev"):
        rows[row["subject"]]["dev"].append(row)
    for subject in ids:
        own = yaml.safe_load((source / f"mmlu_{subject}.yaml").read_text())
        files = {}
        for split in ("test", "dev"):
            files[split] = str(folder / f"{subject}_{split}.json")
            Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows[subject][split]))
        task = {**template, "dataset_path": "json", "dataset_kwargs": {"data_files": files}}
        task |= {"description": own["description"], "task": f"local_mmlu_{subject}"}
        (folder / f"{subject}.yaml").write_text(yaml.safe_dump(task))
    return ids


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--num-fewshot", type=int, required=True)
    parser.add_argument("--ids", type=Path, help="JSON list of question ids; all without it")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--chat-template", type=Path, help="run with --apply_chat_template and this template")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    wanted = set(json.loads(args.ids.read_text())) if args.ids else None
    with tempfile.TemporaryDirectory() as folder:
        ids = write_tasks(Path(folder), wanted)
        model = HFLM(pretrained=args.model, dtype="float32", device="cpu", batch_size=args.batch_size)
        if args.chat_template:
            model.tokenizer.chat_template = args.chat_template.read_text()
        # Its own batches are what is timed: requests are built and results aggregated outside.
        inner, spent = model._loglikelihood_tokens, []

        def timed(*arguments, **options):
            start = time.perf_counter()
            result = inner(*arguments, **options)
            spent.append(time.perf_counter() - start)
            return result

        model._loglikelihood_tokens = timed
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=[f"local_mmlu_{subject}" for subject in ids],
            num_fewshot=args.num_fewshot,
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            apply_chat_template=bool(args.chat_template),
            bootstrap_iters=0,
            log_samples=True,
        )
    with gzip.open(args.output, "wt", encoding="utf-8") as file:
        for subject, names in ids.items():
            samples = sorted(results["samples"][f"local_mmlu_{subject}"], key=lambda sample: sample["doc_id"])
            for name, sample in zip(names, samples, strict=True):
                scores = [float(response[0]) for response in (pair[0] for pair in sample["resps"])]
                row = {"id": name, "loglikelihoods": scores, "acc": sample["acc"]}
                if args.chat_template:
                    prompt = sample["arguments"][0][0]
                    row |= {"prompt_hash": hashlib.sha256(prompt.encode()).hexdigest()}
                file.write(json.dumps(row) + "\n")
    print(json.dumps({"seconds_in_model": sum(spent), "num_questions": sum(map(len, ids.values()))}))


if __name__ == "__main__":
    main()
