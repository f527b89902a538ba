"""The most memory of whole trainings on a CPU against their plan, each in a process of its own.

    python dev/training_memory.py [--json FILE] [--only NAME] [--way WAY] [--resident]

A process runs ``deepseek-moe pretrain`` for two steps of two passes. What the plan means is live: the weights, and the
most bytes at once of what torch allocates while the trainer trains and of what the pool of the fused experts takes.
With ``--resident`` it is the process's resident memory instead, beyond what it held after a training of a tiny model
and before it built its own: what is freed goes back to the system at once (`MALLOC_MMAP_THRESHOLD_`), and the kernel
forgets earlier peaks.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "20m": {"preset": "20m"},
    "20m, 40 experts": {"preset": "20m", "model": {"n_routed_experts": 40}},
    "nano, rows of 512": {"preset": "nano", "sequence-length": 512},
    "100m": {"preset": "100m"},
}
CHECKPOINTED, BF16 = {"gradient-checkpointing": "true"}, {"bf16": "true"}
WAYS: dict[str, dict[str, Any]] = {"fp32": {}, "checkpointed": CHECKPOINTED, "bf16": BF16}
SETTINGS = {
    "max-steps": 2,
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
        size: The preset, what of it is changed, and settings beside those of all.
        way: Settings beside those of all.
        output: The run folder.
    """
    settings = {**SETTINGS, **size, **way, "model": json.dumps(size.get("model", {}))}
    return [
        "pretrain",
        "pretrain-debug",
        "--output",
        output,
        *(f"--{name}={value}" for name, value in settings.items()),
    ]


def status_bytes(field: str) -> int:
    """Return a field of this process's status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


@contextmanager
def allocations(found: dict[str, float]) -> Iterator[None]:
    """Follow what torch allocates, and what the pool of the fused experts takes from the system.

    Args:
        found: Takes `most`, the bytes at once beyond those at the start.
    """
    from torch.profiler import ProfilerActivity, profile

    from deepseek_kernels.cpu import large_buffers

    pages: list[tuple[int, int]] = []
    new_pages = large_buffers._new_pages

    def noted(size: int) -> Any:
        pages.append((time.time_ns(), size))
        return new_pages(size)

    large_buffers.release_idle()
    large_buffers._new_pages = noted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield
    large_buffers._new_pages = new_pages
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for _, size in sorted([*((event.start_ns(), event.nbytes()) for event in events), *pages]):
        now += size
        most = max(most, now)
    found["most"] = most


def watch(what: str, words: list[str]) -> dict[str, float]:
    """Run a training in this process and return its most and its plan, in bytes.

    Args:
        what: `live` or `resident`.
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
        with allocations(found) if what == "live" else nullcontext():
            done = train(self, *args, **kwargs)
        if what == "live":
            found["most"] += sum(one.numel() * one.element_size() for one in self.model.parameters())
        else:
            found["most"] = status_bytes("VmHWM") - before
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
    for name in ("plan_training", "announce"):
        setattr(pretrain, name, lambda *args, **kwargs: None)
    stage_trainer.StageTrainer.train = watched
    with tempfile.TemporaryDirectory() as folder:
        tiny = [*words, "--preset", "debug", "--model", "{}", "--output", f"{folder}/run"]
        for one in (words,) if what == "live" else (tiny, words):
            gc.collect()
            before = status_bytes("VmRSS")
            code = main(one)
            assert code in (0, 3), code
    return found


def measure(size: str, way: str, what: str = "live") -> dict[str, float]:
    """Return the most and the plan of one training, from a process of its own.

    Args:
        size: A name of `SIZES`.
        way: A name of `WAYS`.
        what: `live` or `resident`.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "watch", what, *command(SIZES[size], WAYS[way], f"{folder}/run")]
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print a line per training."""
    parser = argparse.ArgumentParser(description="Most memory of whole trainings against their plan.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="sizes whose name begins so")
    parser.add_argument("--way", choices=WAYS, help="one way alone")
    parser.add_argument("--resident", action="store_true", help="the process's resident memory")
    args = parser.parse_args()
    rows, what = [], "resident" if args.resident else "live"
    print(f"| model | way | plan, MiB | {what}, MiB | plan / {what} |")
    print("| --- | --- | ---: | ---: | ---: |")
    for way in [args.way] if args.way else WAYS:
        for size in (size for size in SIZES if size.startswith(args.only)):
            found = measure(size, way, what)
            rows.append({"size": size, "way": way, **found})
            planned, most = found["plan"] / 2**20, found["most"] / 2**20
            print(f"| {size} | {way} | {planned:.1f} | {most:.1f} | {planned / most:.3f} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["watch"]:
        print(json.dumps(watch(sys.argv[2], sys.argv[3:])))
    else:
        main()
