"""Sets an evaluation's MMLU samples beside lm-evaluation-harness' answers, question by question.

    python run_lm_eval.py MODEL ANSWERS.jsonl.gz --num-fewshot 0 --ids IDS.json    # by an interpreter that has lm_eval
    python compare_samples.py RUN/samples_mmlu.jsonl ANSWERS.jsonl.gz [--write-ids IDS.json]

With ``--write-ids`` it only writes the ids of the samples, for the first line.
"""

import argparse
import gzip
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("samples", type=Path)
    parser.add_argument("answers", type=Path, nargs="?")
    parser.add_argument("--write-ids", type=Path)
    args = parser.parse_args()
    ours = {row["id"]: row["loglikelihoods"] for row in map(json.loads, args.samples.read_text().splitlines())}
    if args.write_ids:
        args.write_ids.write_text(json.dumps(list(ours)))
        return
    with gzip.open(args.answers, "rt", encoding="utf-8") as file:
        theirs = {row["id"]: row["loglikelihoods"] for row in map(json.loads, file)}
    assert ours.keys() == theirs.keys(), "other questions"
    differing = [name for name in ours if _best(ours[name]) != _best(theirs[name])]
    most = max(abs(a - b) for name in ours for a, b in zip(ours[name], theirs[name], strict=True))
    print(f"{len(ours)} questions, {len(differing)} other predictions {differing}, log-likelihoods within {most:.1e}")


def _best(scores: list[float]) -> int:
    return scores.index(max(scores))


if __name__ == "__main__":
    main()
