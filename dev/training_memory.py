"""Peak memory of whole trainings on a CPU against their plan, each in a process of its own.

    python dev/training_memory.py [--json FILE] [--only NAME]

A process runs ``deepseek-moe pretrain`` for three steps of two passes, first of a tiny model, for what is imported
late. Peak is the most resident memory while the trainer trains, beyond what the process held before it built its
model: what is freed goes back to the system at once (`MALLOC_MMAP_THRESHOLD_`), and the kernel forgets earlier peaks.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# What Python, torch and the data take beside it; subtracted from the others.
TINY = "debug"
SIZES: dict[str, dict[str, Any]] = {
    TINY: {"preset": "debug"},
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


def watch(words: list[str]) -> dict[str, float]:
    """Run a training in this process and return its peak and its plan, in bytes.

    Args:
        words: Of the command.
    """
    from deepseek_cli.main import main
    from deepseek_training.launch.training_memory import estimate_training
    from deepseek_training.stages import pretrain
    from deepseek_training.trainer import stage_trainer

    found: dict[str, float] = {}
    train = stage_trainer.StageTrainer.train

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        done = train(self, *args, **kwargs)
        found["peak"] = status_bytes("VmHWM") - found["before"]
        recipe = self.recipe
        found["plan"] = estimate_training(
            self.model,
            recipe.batch_size * recipe.sequence_length,
            trained=self.model.num_parameters(),
            is_bf16=recipe.bf16,
            is_checkpointed=recipe.gradient_checkpointing,
            is_accumulated=True,
        ).total
        return done

    # The plan is made afterwards: the memory that it frees would be taken again.
    pretrain.plan_training = pretrain.announce = lambda *args, **kwargs: None
    stage_trainer.StageTrainer.train = watched
    with tempfile.TemporaryDirectory() as folder:
        tiny = [*words, "--preset", "debug", "--model", "{}", "--output", f"{folder}/run"]
        for one in (tiny, words):
            gc.collect()
            found["before"] = status_bytes("VmRSS")
            code = main(one)
            assert code in (0, 3), code
    return found


def measure(size: str, way: str) -> dict[str, float]:
    """Return peak and plan of one training, from a process of its own.

    Args:
        size: A name of `SIZES`.
        way: A name of `WAYS`.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "watch", *command(SIZES[size], WAYS[way], f"{folder}/run")]
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
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
    print("| model | way | plan, MiB | peak, MiB | plan / peak |")
    print("| --- | --- | ---: | ---: | ---: |")
    for way in WAYS:
        tiny = measure(TINY, way)
        for size in SIZES:
            if size == TINY or not size.startswith(args.only):
                continue
            found = {name: value - tiny[name] for name, value in measure(size, way).items()}
            rows.append({"size": size, "way": way, **found})
            planned, peak = found["plan"] / 2**20, found["peak"] / 2**20
            print(f"| {size} | {way or 'fp32'} | {planned:.1f} | {peak:.1f} | {planned / peak:.3f} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["watch"]:
        print(json.dumps(watch(sys.argv[2:])))
    else:
        main()
