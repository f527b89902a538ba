"""What a policy learns from the reward: PPO with and without guards, GRPO and RLOO, over seeds, side by side.

``deepseek-moe bench rewards --model MODEL --output runs/reward_learning`` trains each method on each
seed, measures every policy on the same held-out prompts with the same gauges, and writes ``table.txt``,
``results.json`` and ``curves.png``. A run that is finished is taken as it is; one that stopped starts afresh.
Surprising: two errors stand beside each gain, over seeds and over prompts, and the larger one counts.
"""

import argparse
import math
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek_cli.benchmarks.reward_runs import METHODS, measure_policy, train_policy
from deepseek_records.run_folder import RunFolder, write_json, write_text
from deepseek_training.recipes.align import AlignRecipe
from deepseek_training.recipes.loading import load_recipe, parse_overrides, recipe_settings

START = "start"
GAUGES = {
    "reward": "reward",
    "relevance": "relevance",
    "safety": "safety",
    "diversity": "diversity",
    "naive_reward": "naive reward",
    "guard": "guard (1: prose in own words)",
    "copied_words": "content words from the prompt",
    "function_words": "function words",
    "distinct_words": "distinct words",
    "kl": "KL, nats a completion",
    "length_tokens": "length, tokens",
}


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, then write the table and the curves; 1 if PPO misses its bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="policy to start from")
    parser.add_argument("--output", default="runs/reward_learning", help="folder of the runs")
    parser.add_argument("--recipe", default="align-demo", help="recipe with sizes and rates")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num-samples", type=int, default=4, help="completions of each held-out prompt")
    parser.add_argument("--max-kl", type=float, default=15.0, help="bar: PPO's KL, nats a completion")
    args, rest = parser.parse_known_args(argv)
    overrides = {**parse_overrides(rest), "model": args.model}
    root = Path(args.output)
    run_start(root, load_recipe(args.recipe, AlignRecipe, overrides), args.num_samples)
    for seed in args.seeds:
        for name in args.methods:
            recipe = load_recipe(args.recipe, AlignRecipe, {**overrides, "seed": seed})
            run_one(root, name, recipe, args.num_samples)
    results = collect(root, args.methods, args.seeds)
    table, is_passed = format_table(results, args.max_kl)
    write_text(root / "table.txt", table + "\n")
    write_json(root / "results.json", results)
    draw_curves(root, args.methods, args.seeds, root / "curves.png")
    print(table)
    return 0 if is_passed else 1


def run_start(root: Path, recipe: AlignRecipe, num_samples: int) -> None:
    """Measure the policy that all methods start from, unless that is done."""
    from deepseek_records.loading import load_model

    run = _open(root / START, {**recipe_settings(recipe), "num_samples": num_samples})
    if run is not None:
        run.finish({"columns": measure_policy(load_model(recipe.model), recipe, num_samples), "curve": []})


def run_one(root: Path, name: str, recipe: AlignRecipe, num_samples: int) -> None:
    """Train one method on one seed and measure its policy, unless that is done."""
    settings = {**recipe_settings(recipe), "method": name, "num_samples": num_samples}
    run = _open(run_path(root, name, recipe.seed), settings)
    if run is None:
        return
    policy, curve = train_policy(METHODS[name], recipe, run.path)
    run.finish({"columns": measure_policy(policy, recipe, num_samples), "curve": curve})
    shutil.rmtree(run.path / "checkpoints", ignore_errors=True)


def run_path(root: Path, name: str, seed: int) -> Path:
    """Return the folder of one run."""
    return root / f"{name.replace(' ', '-')}-{seed}"


def _open(path: Path, settings: dict[str, Any]) -> RunFolder | None:
    """A fresh run folder, or None where a finished run with these settings lies.

    Raises:
        FileExistsError: The folder holds a run with other settings.
    """
    run = RunFolder(path)
    if run.is_finished and run.settings == settings:
        return None
    if path.is_dir() and not run.is_finished:
        shutil.rmtree(path)
    print(path.name, flush=True)
    return RunFolder.create(path, settings, command="reward_learning", seed=settings["seed"])


def collect(root: Path, methods: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Return, for the start and each method and gauge, the mean, and each method's gain with both errors."""
    start = RunFolder(root / START).summary["columns"]
    results: dict[str, Any] = {START: {gauge: {"mean": statistics.fmean(start[gauge])} for gauge in GAUGES}}
    for name in methods:
        runs = [RunFolder(run_path(root, name, seed)).summary["columns"] for seed in seeds]
        results[name] = {gauge: _gain([run[gauge] for run in runs], start[gauge]) for gauge in GAUGES}
    return results


def _gain(by_seed: list[list[float]], start: list[float]) -> dict[str, float]:
    """Mean over seeds and prompts, and the gain over the start with its error over seeds and, paired, over prompts."""
    of_seeds = [statistics.fmean(values) for values in by_seed]
    gains = [statistics.fmean(new) - old for *new, old in zip(*by_seed, start, strict=True)]
    over_seeds = statistics.stdev(of_seeds) / math.sqrt(len(of_seeds)) if len(of_seeds) > 1 else 0.0
    over_prompts = statistics.stdev(gains) / math.sqrt(len(gains))
    return {
        "mean": statistics.fmean(of_seeds),
        "gain": statistics.fmean(gains),
        "stderr_over_seeds": over_seeds,
        "stderr_over_prompts": over_prompts,
        "stderr": max(over_seeds, over_prompts),
    }


def format_table(results: dict[str, Any], max_kl: float) -> tuple[str, bool]:
    """Return the table as text, and whether PPO holds its bar: 3 standard errors at a KL of at most `max_kl`."""
    methods = [name for name in results if name != START]
    lines = [f"{'':32}{START:>9}" + "".join(f"{name:>22}" for name in methods)]
    for gauge, label in GAUGES.items():
        cells = [results[name][gauge] for name in methods]
        texts = "".join(f"{cell['mean']:>14.3f} \u00b1{cell['stderr']:.3f} " for cell in cells)
        lines.append(f"{label:32}{results[START][gauge]['mean']:>9.3f}{texts}")
    for key, label in (("stderr_over_seeds", "seeds"), ("stderr_over_prompts", "prompts, paired")):
        cells = [results[name]["reward"] for name in methods]
        ratios = [f"{cell['gain'] / cell[key]:+.1f}" if cell[key] else "-" for cell in cells]
        lines.append(f"{f'gain / its error over {label}':41}" + "".join(f"{ratio:>22}" for ratio in ratios))
    if "ppo" not in results:
        return "\n".join(lines), True
    ppo = results["ppo"]
    ratio = ppo["reward"]["gain"] / ppo["reward"]["stderr"] if ppo["reward"]["stderr"] else 0.0
    is_passed = ratio >= 3 and ppo["kl"]["mean"] <= max_kl
    lines.append(
        f"PPO: held-out reward {ppo['reward']['gain']:+.4f}, {ratio:.1f} standard errors (bar 3), KL "
        f"{ppo['kl']['mean']:.1f} nats a completion (bar {max_kl:g}): {'holds' if is_passed else 'missed'}"
    )
    return "\n".join(lines), is_passed


def draw_curves(root: Path, methods: Sequence[str], seeds: Sequence[int], path: Path) -> None:
    """Draw each gauge of the training batches against the updates: the mean of the seeds, thin lines for each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = ["reward", "relevance", "safety", "diversity", "naive_reward", "guard", "copied_words", "function_words"]
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.6), sharex=True, constrained_layout=True)
    for axis, gauge in zip(axes.flat, names, strict=True):
        for i, name in enumerate(methods):
            curves = [[row[gauge] for row in RunFolder(run_path(root, name, seed)).summary["curve"]] for seed in seeds]
            for curve in curves:
                axis.plot(range(1, len(curve) + 1), curve, color=f"C{i}", alpha=0.25, linewidth=0.8)
            mean = [statistics.fmean(values) for values in zip(*curves, strict=False)]
            axis.plot(range(1, len(mean) + 1), mean, color=f"C{i}", linewidth=1.8, label=name)
        axis.set_title(GAUGES[gauge], fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("update")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
