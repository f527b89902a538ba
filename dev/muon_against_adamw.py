"""Trains `pretrain-demo` with Muon and with AdamW for equal CPU time, at several learning rates.

    OMP_NUM_THREADS=1 python dev/muon_against_adamw.py RUNS --full adamw=3e-3 muon=1.2e-2

A step of each is timed first, interleaved, and Muon gets as many fewer steps as its step costs more; the schedule of
each ends with its last step. Learning rates are compared on one seed at a share of the steps; those that --full names
are trained to the end with every seed. What a training took is counted in CPU seconds of the process, on one thread.
Finished runs are taken as they are.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS

from deepseek_records.run_folder import RunFolder
from deepseek_records.statistics import mean_with_error
from deepseek_training.recipes.loading import load_recipe
from deepseek_training.stages.pretrain import PretrainRecipe, pretrain
from deepseek_training.trainer.muon import build_muon
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

OPTIMIZERS = ("adamw", "muon")


class CpuClock(TrainerCallback):
    """Counts the CPU seconds of the last training of this process."""

    seconds = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start."""
        CpuClock.seconds = -time.process_time()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop."""
        CpuClock.seconds += time.process_time()


def step_cost(recipe: PretrainRecipe, num_pairs: int) -> tuple[float, float]:
    """Return what a step of Muon costs in steps of AdamW, with its standard error, over interleaved pairs.

    Args:
        recipe: The settings.
        num_pairs: Steps of each.
    """
    steppers = {}
    for name in OPTIMIZERS:
        torch.manual_seed(0)
        config = DeepseekConfig.from_preset(recipe.preset, vocab_size=recipe.vocab_size, **recipe.model)
        model = DeepseekForCausalLM(config).train()
        model.set_experts_implementation(recipe.experts_implementation)
        rates = {"lr": 1e-4, "weight_decay": recipe.weight_decay, "betas": (0.9, recipe.adam_beta2)}
        steppers[name] = (
            model,
            (build_muon(model, **rates) if name == "muon" else torch.optim.AdamW(model.parameters(), **rates)),
        )
    ratios = []
    for number in range(num_pairs + 3):
        ids = torch.randint(0, recipe.vocab_size, (recipe.batch_size, recipe.sequence_length))
        seconds = {}
        for name in OPTIMIZERS if number % 2 else OPTIMIZERS[::-1]:
            seconds[name] = timed_step(*steppers[name], ids, recipe.max_grad_norm)
        if number >= 3:
            ratios.append(seconds["muon"] / seconds["adamw"])
    return statistics.mean(ratios), statistics.stdev(ratios) / len(ratios) ** 0.5


def timed_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, max_grad_norm: float
) -> float:
    """Take a step of training, and return its CPU seconds.

    Args:
        model: Any causal model.
        optimizer: Of its parameters.
        ids: Tokens, which are the labels too.
        max_grad_norm: To which gradients are clipped.
    """
    began = time.process_time()
    model(input_ids=ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - began


def train(recipe: PretrainRecipe, folder: Path, **settings: Any) -> dict[str, float]:
    """Return bits per byte on held-out text and CPU seconds of a training, run now unless the folder holds it.

    Args:
        recipe: The settings.
        folder: Of the run.
        **settings: What differs from the recipe.
    """
    run, clock = RunFolder(folder), folder / "cpu_seconds.json"
    if not clock.exists():
        changed = dataclasses.replace(recipe, **settings, eval_steps=0, save_steps=0, sample_steps=0, report_to=[])
        pretrain(changed, folder, overwrite=True)
        clock.write_text(json.dumps(CpuClock.seconds))
    return {"bits_per_byte": run.summary.results[0].value, "cpu_seconds": json.loads(clock.read_text())}


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, help="folder of the trainings")
    parser.add_argument("--recipe", default="pretrain-demo")
    parser.add_argument("--steps", type=int, default=700, help="of AdamW; as many fewer of Muon as a step costs more")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.5e-3, 3e-3, 4.5e-3, 6e-3, 1.2e-2, 2.4e-2])
    parser.add_argument("--full", nargs="+", default=["adamw=3e-3", "muon=1.2e-2"], help="optimizer=rate")
    parser.add_argument("--share", type=float, default=0.5, help="of the steps, to compare learning rates by")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=40, help="steps of each that are timed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    DEFAULT_CALLBACKS.append(CpuClock)
    recipe = load_recipe(args.recipe, PretrainRecipe)
    ratio_file = args.runs / "step_cost.json"
    if not ratio_file.exists():
        args.runs.mkdir(parents=True, exist_ok=True)
        ratio_file.write_text(json.dumps(step_cost(recipe, args.pairs)))
    ratio, error = json.loads(ratio_file.read_text())
    print(f"a step of Muon costs {ratio:.3f} +- {error:.3f} steps of AdamW")
    steps = {"adamw": args.steps, "muon": round(args.steps / ratio)}
    for name in OPTIMIZERS:
        for rate in args.rates:
            settings = {"optimizer": name, "learning_rate": rate, "max_steps": round(steps[name] * args.share)}
            figures = train(recipe, args.runs / f"tune-{name}-{rate:g}", **settings)
            print(json.dumps({**settings, **figures}), flush=True)
    bits = {}
    for given in args.full:
        name, rate = given.partition("=")[0], float(given.partition("=")[2])
        settings = {"optimizer": name, "learning_rate": rate, "max_steps": steps[name]}
        rows = [
            train(recipe, args.runs / f"{name}-{rate:g}-seed{seed}", seed=seed, **settings)
            for seed in range(args.seeds)
        ]
        bits[given] = [row["bits_per_byte"] for row in rows]
        cpu = mean_with_error([row["cpu_seconds"] for row in rows])
        print(json.dumps(settings), "bits per byte", mean_with_error(bits[given]), "CPU s", cpu, flush=True)
        differences = [one - base for one, base in zip(bits[given], bits[args.full[0]], strict=True)]
        print(f"{given} - {args.full[0]}:", mean_with_error(differences), [round(one, 4) for one in differences])
    return 0


if __name__ == "__main__":
    sys.exit(main())
