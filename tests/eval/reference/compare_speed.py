"""Times 5-shot MMLU here and in lm-evaluation-harness, on the same model in one process, and compares the answers.

    python compare_speed.py MODEL [--subjects N] [--batch-sizes 8,32] [--threads 2]

Run by an interpreter that has both lm_eval 0.4.13 and this package. Timed is all that follows the loaded model:
encoding and scoring. lm_eval is timed at each batch size and its best is compared with our best.
"""

import argparse
import json
import time
from itertools import groupby
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from deepseek_eval.answers.loglikelihood import encode_items, plan_batches, score_batches, supports_shared_prefix
from deepseek_eval.model_loading import load_model
from deepseek_eval.tasks import mmlu


def time_ours(model: str, items: list, batch_size: int, dtype: str) -> tuple[float, list[list[float]]]:
    loaded = load_model(model, dtype=dtype)
    start = time.perf_counter()
    batches = plan_batches(encode_items(loaded, items), batch_size, supports_shared_prefix(loaded))
    scores = {row.item.id: scores for row, scores in score_batches(loaded, batches)}
    return time.perf_counter() - start, [scores[item.id] for item in items]


def time_lm_eval(model: str, items: list, batch_size: int, dtype: str) -> tuple[float, list[list[float]]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    harness = HFLM(pretrained=model, dtype=dtype, device=device, batch_size=batch_size)
    requests = [
        Instance("loglikelihood", {}, (item.prompt, choice), index)
        for index, item in enumerate(items)
        for choice in item.choices
    ]
    start = time.perf_counter()
    scores = [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    return time.perf_counter() - start, [scores[index : index + 4] for index in range(0, len(scores), 4)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--subjects", type=int, default=3, help="how many whole subjects")
    parser.add_argument("--batch-sizes", default="8,32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    groups = [list(group) for _, group in groupby(mmlu.build_items(5, None, None), key=lambda item: item.group)]
    items = [item for group in groups[: args.subjects] for item in group]
    report = {"model": Path(args.model).name, "questions": len(items), "threads": args.threads, "dtype": args.dtype}
    answers = {}
    for name, measure in (("ours", time_ours), ("lm_eval", time_lm_eval)):
        for batch_size in map(int, args.batch_sizes.split(",")):
            seconds, answers[name] = measure(args.model, items, batch_size, args.dtype)
            report[f"{name}, batch {batch_size}: questions per second"] = round(len(items) / seconds, 2)
            best = f"{name}: best"
            report[best] = max(report.get(best, 0.0), round(len(items) / seconds, 2))
    report["ratio"] = round(report["ours: best"] / report["lm_eval: best"], 2)
    pairs = list(zip(answers["ours"], answers["lm_eval"], strict=True))
    report["predictions that differ"] = sum(a.index(max(a)) != b.index(max(b)) for a, b in pairs)
    report["largest difference"] = max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
