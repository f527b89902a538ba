"""Writes lm-evaluation-harness' greedy completions of HumanEval, for the agreement test.

    python run_lm_eval_humaneval.py MODEL OUTPUT.jsonl.gz --max-new-tokens 48

Run by an interpreter that has lm_eval 0.4.13. Prompts and stop strings come from lm_eval's own ``humaneval.yaml``; the
length limit is the one setting changed, so that small models finish.
"""

import argparse
import gzip
import json
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))  # for modeling_deepseek

import lm_eval  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.utils import apply_template  # noqa: E402

import modeling_deepseek  # noqa: E402, F401


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--max-new-tokens", type=int, required=True)
    args = parser.parse_args()
    text = (Path(lm_eval.__file__).parent / "tasks/humaneval/humaneval.yaml").read_text()
    task = yaml.safe_load(text.replace("!function", ""))
    settings = {**task["generation_kwargs"], "max_gen_toks": args.max_new_tokens}
    with gzip.open(ROOT / "eval/data/humaneval.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    requests = [
        Instance("generate_until", row, (apply_template(task["doc_to_text"], row), dict(settings)), index)
        for index, row in enumerate(rows)
    ]
    model = HFLM(pretrained=args.model, dtype="float32", device="cpu", batch_size=32)
    completions = model.generate_until(requests)
    with gzip.GzipFile(args.output, "wb", mtime=0) as file:
        for row, completion in zip(rows, completions, strict=True):
            file.write((json.dumps({"id": row["task_id"], "completion": completion}) + "\n").encode())


if __name__ == "__main__":
    main()
