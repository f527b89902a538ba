"""Peak memory of whole trainings on a CPU against their plan, each in a process of its own.

    python dev/training_memory.py [--json FILE] [--only NAME]

A process runs ``deepseek-moe pretrain`` for three steps of two passes. What it allocates is the largest sum of living
tensors while the trainer trains, weights included, as torch's profiler tells; resident is what the system gave the
process meanwhile, in a run of its own without the profiler.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "20m": {"preset": "20m"},
    "20m, 40 experts": {"preset": "20m", "n_routed_experts": 40},
    "100m": {"preset": "100m"},
}
CHECKPOINTED, BF16 = {"gradient-checkpointing": "true"}, {"bf16": "true"}
WAYS: dict[str, dict[str, Any]] = {"": {}, "checkpointed": CHECKPOINTED, "bf16": BF16}
SETTINGS = {
    "max-steps": 3,
    "warmup-steps": 0,
    "logging-steps": 1,
    "eval-bytes": 1000,
    "eval-steps": 0,
    "save-steps": 0,
    "batch-size": 2,
    "gradient-accumulation-steps": 2,
    "sequence-length": 256,
    "check-bigram": "false",
    "report-to": "[]",
    "sample-prompts": "[]",
}


def command(size: dict[str, Any], way: dict[str, Any], output: str) -> list[str]:
    """Return the words of a training.

    Args:
        size: The preset and what of it is changed.
        way: Settings beside those of all.
        output: The run folder.
    """
    changes = {name: value for name, value in size.items() if name != "preset"}
    words = ["pretrain", "pretrain-debug", "--preset", size["preset"], "--model", json.dumps(changes)]
    return [*words, "--output", output, *(f"--{name}={value}" for name, value in {**SETTINGS, **way}.items())]


def status_bytes(field: str) -> int:
    """Return a field of this process's status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def most_allocated(events: Any) -> int:
    """Return the largest sum of what a profile's allocations leave alive."""
    now = most = 0
    for event in sorted((one for one in events if one.name() == "[memory]"), key=lambda one: one.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def watch(kind: str, words: list[str]) -> dict[str, float]:
    """Run a training in this process and return its peak and its plan, in bytes.

    Args:
        kind: ``allocated`` or ``resident``.
        words: Of the command.
    """
    from torch.profiler import ProfilerActivity, profile

    from deepseek_cli.main import main
    from deepseek_training.launch import plan
    from deepseek_training.trainer import stage_trainer

    found: dict[str, float] = {}
    estimate, train = plan.estimate_training, stage_trainer.StageTrainer.train

    def estimated(*args: Any, **kwargs: Any) -> Any:
        memory = estimate(*args, **kwargs)
        found.update(plan=memory.total, activations=memory.activations)
        return memory

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        weights = sum(parameter.nbytes for parameter in self.model.parameters())
        before = status_bytes("VmRSS") - weights
        if kind == "resident":
            done = train(self, *args, **kwargs)
            found["peak"] = status_bytes("VmHWM") - before
            return done
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            done = train(self, *args, **kwargs)
        found["peak"] = weights + most_allocated(recorded.profiler.kineto_results.events())
        return done

    plan.estimate_training, stage_trainer.StageTrainer.train = estimated, watched
    code = main(words)
    assert code in (0, 3), code
    return found


def measure(kind: str, size: str, way: str) -> dict[str, float]:
    """Return peak and plan of one training, from a process of its own.

    Args:
        kind: As for `watch`.
        size: A name of `SIZES`.
        way: A name of `WAYS`.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "watch", kind, *command(SIZES[size], WAYS[way], f"{folder}/run")]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print a line per training."""
    parser = argparse.ArgumentParser(description="Peak memory of whole trainings against their plan.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="sizes whose name begins so")
    args = parser.parse_args()
    rows = []
    print("| model | way | plan, MiB | allocated, MiB | plan / allocated | resident, MiB |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for size in SIZES:
        for way in WAYS:
            if not size.startswith(args.only):
                continue
            allocated, resident = (measure(kind, size, way) for kind in ("allocated", "resident"))
            rows.append({"size": size, "way": way, **allocated, "resident": resident["peak"]})
            ratio = allocated["plan"] / allocated["peak"]
            cells = [f"{x / 2**20:.1f}" for x in (allocated["plan"], allocated["peak"], resident["peak"])]
            print(f"| {size} | {way or 'fp32'} | {cells[0]} | {cells[1]} | {ratio:.3f} | {cells[2]} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["watch"]:
        print(json.dumps(watch(sys.argv[2], sys.argv[3:])))
    else:
        main()
