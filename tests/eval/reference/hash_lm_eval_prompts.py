"""Prints the SHA-256 of lm-evaluation-harness' HumanEval and MBPP prompts, joined in order, by task and shots.

    python hash_lm_eval_prompts.py

Run by an interpreter that has lm_eval 0.4.13. The tasks are lm_eval's own YAML files over the embedded data; their
metrics are left out, because loading them downloads code. The chat tasks are rendered as ``--apply_chat_template``
does, through the template in ``chat_template.jinja``.
"""

import ast
import gzip
import hashlib
import json
import tempfile
from functools import partial
from pathlib import Path

import lm_eval
import yaml
from lm_eval.api.task import ConfigurableTask
from transformers import AutoTokenizer

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[2] / "eval/data"
TASKS = Path(lm_eval.__file__).parent / "tasks"


def read_config(name: str) -> dict:
    """A task file with what it includes, without what would import or download."""
    path = TASKS / name
    config = yaml.safe_load(path.read_text().replace("!function", ""))
    if "include" in config:
        config = {**read_config(f"{path.parent.name}/{config.pop('include')}"), **config}
    for key in ("dataset_name", "unsafe_code", "filter_list"):
        config.pop(key, None)
    return config | {"metric_list": [{"metric": "bypass"}]}


def read_mbpp_shots() -> list[dict]:
    # The shots stand in a function of a module that cannot be imported offline.
    tree = ast.parse((TASKS / "mbpp/utils.py").read_text())
    function = next(node for node in tree.body if getattr(node, "name", "") == "list_fewshot_samples")
    return ast.literal_eval(function.body[0].value)


def make_task(name: str, rows: list[dict], folder: str) -> ConfigurableTask:
    path = Path(folder) / "rows.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = read_config(name) | {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}}
    if name.startswith("mbpp"):
        config["fewshot_config"] = {"sampler": "first_n", "samples": read_mbpp_shots()}
    return ConfigurableTask(config=config)


def read_rows(name: str) -> list[dict]:
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(HERE / "ours")
    tokenizer.chat_template = (HERE / "chat_template.jinja").read_text()

    def render(messages: list[dict], add_generation_prompt: bool) -> str:
        """As HFLM.apply_chat_template does."""
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    mbpp = [row for row in read_rows("mbpp") if 11 <= row["task_id"] <= 510]
    jobs = [("humaneval/humaneval", read_rows("humaneval"), (0,)), ("mbpp/mbpp", mbpp, (0, 3))]
    for stem, rows, shots in jobs:
        for suffix in ("", "_instruct"):
            with tempfile.TemporaryDirectory() as folder:
                task = make_task(f"{stem}{suffix}.yaml", rows, folder)
                context = task.fewshot_context
                if suffix:
                    chat = {"apply_chat_template": True, "fewshot_as_multiturn": True, "chat_template": render}
                    context = partial(task.fewshot_context, **chat)
                for number in shots:
                    prompts = [
                        context(doc, number, **({"gen_prefix": task.doc_to_prefix(doc)} if suffix else {}))
                        for doc in task.test_docs()
                    ]
                    digest = hashlib.sha256("\0".join(prompts).encode()).hexdigest()
                    print(f"{stem.split('/')[1]}{suffix}", number, len(prompts), digest)


if __name__ == "__main__":
    main()
