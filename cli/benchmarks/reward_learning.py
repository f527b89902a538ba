"""What a policy learns from the reward: PPO with and without guards, GRPO and RLOO, over seeds, side by side.

``deepseek-moe bench rewards RECIPE --model MODEL`` trains each method on each seed, measures every policy on the same
held-out prompts with the same gauges, and writes ``table.txt``, ``results.json`` and ``curves.png``. A run that is
finished is taken as it is; one that stopped begins again. Two errors stand beside each gain, over seeds and over
prompts, and the larger one counts.
"""

import argparse
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek_cli.benchmarks.result_files import write_over_runs
from deepseek_cli.benchmarks.reward_runs import METHODS, measure_policy, train_policy
from deepseek_records.exit_codes import MISSED
from deepseek_records.run_folder import RunFolder
from deepseek_records.statistics import mean_with_error
from deepseek_records.summary import Summary
from deepseek_training.recipes.align import AlignRecipe
from deepseek_training.recipes.loading import collect_overrides, load_recipe, recipe_settings

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


def run(args: argparse.Namespace) -> int:
    """Train and measure what is missing, then print and write the table and draw the curves.

    Args:
        args: The options of ``deepseek-moe bench rewards``.

    Returns:
        0, or 3 when PPO misses its target.

    Raises:
        ValueError: An option that cannot work, before anything is trained.
    """
    overrides = collect_overrides(args)
    _check(args, overrides)
    methods, root = args.methods or list(METHODS), Path(args.output)
    recipes = {seed: load_recipe(args.recipe, AlignRecipe, {**overrides, "seed": seed}) for seed in args.seeds}
    run_start(root, load_recipe(args.recipe, AlignRecipe, overrides), args.num_samples, overwrite=args.overwrite)
    for recipe in recipes.values():
        for name in methods:
            run_one(root, name, recipe, args.num_samples, overwrite=args.overwrite)
    results = collect(root, methods, args.seeds)
    table, is_passed = format_table(results, recipe.min_gain_stderr or 0.0, args.max_kl)
    draw_curves(root, methods, args.seeds, root / "curves.png")
    print(table)
    write_over_runs(root, "rewards", results, table)
    return 0 if is_passed else MISSED


def _check(args: argparse.Namespace, overrides: dict[str, Any]) -> None:
    for name in args.methods or ():
        if name not in METHODS:
            raise ValueError(f"methods: got {name!r}, expected some of {', '.join(METHODS)}")
    for name in ("methods", "seeds"):
        values = getattr(args, name) or []
        if len(set(values)) < len(values):
            raise ValueError(f"{name}: got {', '.join(map(str, values))}, expected each once")
    if "seed" in overrides:
        raise ValueError(
            f"seed: got {overrides['seed']}, expected none; pass --seeds, which every method is trained on"
        )
    if args.num_samples < 1:
        raise ValueError(f"num_samples: got {args.num_samples}, expected at least 1")
    if not args.max_kl > 0:
        raise ValueError(f"max_kl: got {args.max_kl}, expected a number above 0")


def run_start(root: Path, recipe: AlignRecipe, num_samples: int, *, overwrite: bool = False) -> None:
    """Measure the policy that all methods start from, unless that is done."""
    from deepseek_records.loading import load_model

    settings = {**recipe_settings(recipe), "num_samples": num_samples}
    if not _is_done(root / START, settings):
        policy = load_model(recipe.model)  # before the folder: a wrong path leaves none behind
        run = _open(root / START, settings, overwrite)
        run.finish(_summarize(measure_policy(policy, recipe, num_samples), []))


def run_one(root: Path, name: str, recipe: AlignRecipe, num_samples: int, *, overwrite: bool = False) -> None:
    """Train one method on one seed and measure its policy, unless that is done."""
    path = run_path(root, name, recipe.seed)
    settings = {**recipe_settings(recipe), "method": name, "num_samples": num_samples}
    if not _is_done(path, settings):
        run = _open(path, settings, overwrite)
        policy, curve = train_policy(METHODS[name], recipe, path)
        run.finish(_summarize(measure_policy(policy, recipe, num_samples), curve))
        shutil.rmtree(path / "checkpoints", ignore_errors=True)


def _summarize(columns: dict[str, Any], curve: list[dict[str, Any]]) -> Summary:
    return Summary(stage="reward_learning", details={"columns": columns, "curve": curve})


def run_path(root: Path, name: str, seed: int) -> Path:
    """Return the folder of one run."""
    return root / f"{name.replace(' ', '-')}-{seed}"


def _is_done(path: Path, settings: dict[str, Any]) -> bool:
    run = RunFolder(path)
    return run.is_finished and run.settings == settings


def _open(path: Path, settings: dict[str, Any], overwrite: bool) -> RunFolder:
    """A fresh run folder; one that stopped is begun again.

    Raises:
        FileExistsError: The folder holds a finished run with other settings, or files of another kind.
    """
    print(path.name, flush=True)
    overwrite = overwrite or not RunFolder(path).is_finished
    return RunFolder.create(path, settings, command="bench rewards", seed=settings["seed"], overwrite=overwrite)


def collect(root: Path, methods: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Return, for the start and each method and gauge, the mean, and each method's gain with both errors."""
    start = RunFolder(root / START).summary.details["columns"]
    results: dict[str, Any] = {START: {gauge: {"mean": statistics.fmean(start[gauge])} for gauge in GAUGES}}
    for name in methods:
        runs = [RunFolder(run_path(root, name, seed)).summary.details["columns"] for seed in seeds]
        results[name] = {gauge: _gain([run[gauge] for run in runs], start[gauge]) for gauge in GAUGES}
    return results


def _gain(by_seed: list[list[float]], start: list[float]) -> dict[str, float | None]:
    """Mean over seeds and prompts, and the gain over the start with its error over seeds and, paired, over prompts."""
    of_seeds = [statistics.fmean(values) for values in by_seed]
    gains = [statistics.fmean(new) - old for *new, old in zip(*by_seed, start, strict=True)]
    (_, over_seeds), (_, over_prompts) = mean_with_error(of_seeds), mean_with_error(gains)
    known = [error for error in (over_seeds, over_prompts) if error is not None]
    return {
        "mean": statistics.fmean(of_seeds),
        "gain": statistics.fmean(gains),
        "stderr_over_seeds": over_seeds,
        "stderr_over_prompts": over_prompts,
        "stderr": max(known, default=None),
    }


def format_table(results: dict[str, Any], min_gain: float, max_kl: float) -> tuple[str, bool]:
    """Return the table as text, and whether PPO meets its target.

    Args:
        results: From `collect`.
        min_gain: The target: the held-out reward's gain in standard errors, at least.
        max_kl: The target: PPO's divergence from the start, nats per completion, at most.
    """
    methods = [name for name in results if name != START]
    lines = [f"{'':32}{START:>9}" + "".join(f"{name:>22}" for name in methods)]
    for gauge, label in GAUGES.items():
        cells = [results[name][gauge] for name in methods]
        texts = "".join(f"{cell['mean']:>14.3f} {_plus_minus(cell['stderr']):6} " for cell in cells)
        lines.append(f"{label:32}{results[START][gauge]['mean']:>9.3f}{texts}")
    for key, label in (("stderr_over_seeds", "seeds"), ("stderr_over_prompts", "prompts, paired")):
        cells = [results[name]["reward"] for name in methods]
        ratios = [f"{cell['gain'] / cell[key]:+.1f}" if cell[key] else "-" for cell in cells]
        lines.append(f"{f'gain / its error over {label}':41}" + "".join(f"{ratio:>22}" for ratio in ratios))
    if "ppo" not in results:
        return "\n".join(lines), True
    ppo = results["ppo"]
    ratio = ppo["reward"]["gain"] / ppo["reward"]["stderr"] if ppo["reward"]["stderr"] else 0.0
    is_passed = ratio >= min_gain and ppo["kl"]["mean"] <= max_kl
    lines.append(
        f"PPO: held-out reward {ppo['reward']['gain']:+.4f}, {ratio:.1f} standard errors (target {min_gain:g}), KL "
        f"{ppo['kl']['mean']:.1f} nats per completion (target {max_kl:g}): {'met' if is_passed else 'missed'}"
    )
    return "\n".join(lines), is_passed


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f"\u00b1{error:.3f}"


def draw_curves(root: Path, methods: Sequence[str], seeds: Sequence[int], path: Path) -> None:
    """Draw each gauge of the training batches against the updates: the mean of the seeds, thin lines for each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = ["reward", "relevance", "safety", "diversity", "naive_reward", "guard", "copied_words", "function_words"]
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.6), sharex=True, constrained_layout=True)
    for axis, gauge in zip(axes.flat, names, strict=True):
        for i, name in enumerate(methods):
            curves = [
                [row[gauge] for row in RunFolder(run_path(root, name, seed)).summary.details["curve"]]
                for seed in seeds
            ]
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
