"""Prints the SHA-256 of lm-evaluation-harness' MBPP prompts, joined in order, for 0 and 3 shots.

    python hash_lm_eval_prompts.py

Run by an interpreter that has lm_eval 0.4.13. The task is lm_eval's own ``mbpp.yaml`` over the embedded data; its
metric is left out, because loading it downloads code.
"""

import ast
import gzip
import hashlib
import json
import tempfile
from pathlib import Path

import lm_eval
import yaml
from lm_eval.api.task import ConfigurableTask

ROOT = Path(__file__).resolve().parents[3]


def main() -> None:
    folder = Path(lm_eval.__file__).parent / "tasks/mbpp"
    config = yaml.safe_load((folder / "mbpp.yaml").read_text().replace("!function", ""))
    # The shots stand in a function of a module that cannot be imported offline.
    tree = ast.parse((folder / "utils.py").read_text())
    function = next(node for node in tree.body if getattr(node, "name", "") == "list_fewshot_samples")
    shots = ast.literal_eval(function.body[0].value)
    with gzip.open(ROOT / "eval/data/mbpp.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if 11 <= row["task_id"] <= 510]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as data:
        data.write("".join(json.dumps(row) + "\n" for row in rows))
        data.flush()
        config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": data.name}}}
        config |= {"metric_list": [{"metric": "bypass"}], "fewshot_config": {"sampler": "first_n", "samples": shots}}
        for key in ("dataset_name", "unsafe_code"):
            config.pop(key, None)
        task = ConfigurableTask(config=config)
        for num_fewshot in (0, 3):
            prompts = [task.fewshot_context(doc, num_fewshot) for doc in task.test_docs()]
            print(num_fewshot, len(prompts), hashlib.sha256("\0".join(prompts).encode()).hexdigest())


if __name__ == "__main__":
    main()
