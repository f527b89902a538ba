"""Reduces lm-evaluation-harness' answers to what the comparison on all questions needs: predictions and near ties.

    python keep_predictions.py ours 5 ANSWERS.jsonl[.gz] ...

The answers are what ``run_lm_eval.py`` wrote, in one file or one a subject, 14,042 in all. They are added to
``lm_eval_0.4.13_all.json.gz``: by checkpoint and shots one letter a question in the order of the embedded data, and
the questions whose two best answers lie closer than 1e-4, with that distance.
"""

import gzip
import json
import sys
from pathlib import Path

from deepseek_eval.tasks import mmlu

OUTPUT = Path(__file__).resolve().parent / "lm_eval_0.4.13_all.json.gz"
TIE = 1e-4


def read_answers(paths: list[str]) -> dict[str, list[float]]:
    answers = {}
    for path in paths:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            answers |= {row["id"]: row["loglikelihoods"] for row in map(json.loads, file)}
    return answers


def main() -> None:
    model, num_fewshot, *paths = sys.argv[1:]
    answers = read_answers(paths)
    names = [item.id for item in mmlu.build_items(0, None, None)]
    assert set(answers) == set(names), f"{len(answers)} answers, expected {len(names)}"
    letters, ties = [], {}
    for name in names:
        scores = answers[name]
        best, second = sorted(scores, reverse=True)[:2]
        letters.append("ABCD"[scores.index(best)])
        if best - second < TIE:
            ties[name] = best - second
    kept = json.loads(gzip.decompress(OUTPUT.read_bytes())) if OUTPUT.exists() else {}
    kept[f"{model} {num_fewshot}"] = {"predictions": "".join(letters), "near_ties": ties}
    OUTPUT.write_bytes(gzip.compress(json.dumps(dict(sorted(kept.items()))).encode(), 9, mtime=0))
    print(f"{model}, {num_fewshot} shots: {len(letters)} predictions, {len(ties)} near ties")


if __name__ == "__main__":
    main()
