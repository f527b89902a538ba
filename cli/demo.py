"""``deepseek-moe demo``: the whole path at small size, offline, on the embedded data.

Joins the parts: each stage is the very function its own subcommand runs (`pretrain`, `adapt`, `sft`, `align`,
`evaluate`, `card`), with an embedded recipe. A stage that was interrupted goes on from its last checkpoint, and one
that finished is never run twice; an interrupted demo ends with the figures of an uninterrupted one.
"""

import argparse
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_cli.stage_command import close_with_targets
from deepseek_records.summary import Summary

HELP = "Run the whole path at small size, offline: pretrain, adapt, sft, align, evaluate, model card, report."
EXAMPLES = """
  deepseek-moe demo
  deepseek-moe demo --dry-run
  deepseek-moe demo --output runs/second --size debug
"""
# What the demo took where its figures were measured; more is worth a note on another machine, not a failure.
STATED_SECONDS = 8 * 60
STATED_MEMORY_GIB = 6.0
_MARKER = "demo-size.txt"


@dataclass(frozen=True)
class Size:
    """What one size of the demo runs.

    Attributes:
        recipe_suffix: Ending of the embedded recipes' names.
        limit: Items a task: MMLU questions of each of the 57 subjects, HumanEval problems; a task not named is whole.
        max_new_tokens: Tokens written for a HumanEval problem.
        has_targets: Whether the targets of quality hold at this size.
    """

    recipe_suffix: str
    limit: dict[str, int]
    max_new_tokens: int
    has_targets: bool


SIZES = {
    "demo": Size("demo", limit={"mmlu": 2}, max_new_tokens=96, has_targets=True),
    "debug": Size("debug", limit={"mmlu": 1, "humaneval": 8}, max_new_tokens=16, has_targets=False),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--output", default="runs/demo", help="folder of the demo's runs")
    parser.add_argument(
        "--size",
        choices=sorted(SIZES),
        default="demo",
        help="debug: every step in about a minute, targets not checked",
    )
    parser.add_argument("--overwrite", action="store_true", help="start again even where stages have finished")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the stages, what they need and how long they take; write nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Run the stages that have not finished, then write the card and the report and print the table."""
    root = Path(args.output)
    size = SIZES[args.size]
    _check(root, args.size, overwrite=args.overwrite)
    if args.dry_run:
        print(_describe(root, size, overwrite=args.overwrite))
        return 0
    _prepare(root, args.size, overwrite=args.overwrite)
    for number, (name, stage) in enumerate(STAGES.items(), start=1):
        _run_stage(root / name, f"[{number}/{len(STAGES) + 1}] {name}", lambda out, stage=stage: stage(out, size))
    print(f"[{len(STAGES) + 1}/{len(STAGES) + 1}] model card and report", flush=True)
    return close_with_targets(args, _close(root, size))


def _check(root: Path, size_name: str, *, overwrite: bool) -> None:
    """Refuse a folder that holds something else than a demo of this size."""
    from deepseek_records.output_paths import check_output

    marker = check_output(root) / _MARKER
    if not (root.is_dir() and any(root.iterdir())):
        return
    held = marker.read_text(encoding="utf-8").strip() if marker.is_file() else None
    if held is None:
        raise FileExistsError(f"--output: {root} is not empty and holds no demo; pass another --output")
    if held != size_name and not overwrite:
        raise FileExistsError(
            f"--output: {root} holds a demo of size {held}, not {size_name}; pass another --output, or --overwrite"
        )


def _prepare(root: Path, size_name: str, *, overwrite: bool) -> None:
    """Make the folder, and empty it where it is to be overwritten."""
    from deepseek_records.output_paths import make_output
    from deepseek_records.run_folder import write_text

    make_output(root)
    if overwrite:
        for path in root.iterdir():  # The marker stays: a demo interrupted here is still known as one.
            if path.is_dir():
                shutil.rmtree(path)
    write_text(root / _MARKER, size_name + "\n")


def _describe(root: Path, size: Size, *, overwrite: bool) -> str:
    """What a run would do with each stage, and what the whole demo needs."""
    from deepseek_records.run_folder import RunFolder

    lines = [f"demo: into {root}"]
    for name in STAGES:
        state = "would be run"
        if not overwrite and (root / name).exists():
            state = "is done" if RunFolder(root / name).is_finished else "was interrupted and would go on"
        recipe = f"MMLU and HumanEval, limit {size.limit}" if name == "evaluate" else f"{name}-{size.recipe_suffix}"
        lines.append(f"  {name:<10} {state:<31} {recipe}")
    cost = f"at most {STATED_SECONDS // 60} minutes and {STATED_MEMORY_GIB:g} GiB on two idle CPU cores"
    lines.append(f"  needs      {cost if size.has_targets else 'about a minute on two idle CPU cores'}; no network")
    lines.append("dry run: nothing was written; deepseek-moe STAGE RECIPE --dry-run tells more of a stage")
    return "\n".join(lines)


def _run_stage(output: Path, title: str, stage: Callable[[Path], Any]) -> None:
    """Run one stage, or the rest of it, unless it has finished."""
    from deepseek_records.run_folder import RunFolder

    if RunFolder(output).is_finished:
        print(f"{title}: done before, in {output}", flush=True)
        return
    print(f"{title}: was interrupted, goes on" if output.exists() else title, flush=True)
    stage(output)


def _pretrain(output: Path, size: Size) -> None:
    from deepseek_training.recipes.loading import load_recipe
    from deepseek_training.stages.pretrain import PretrainRecipe, pretrain

    pretrain(load_recipe(f"pretrain-{size.recipe_suffix}", PretrainRecipe, {}), output)


def _adapt(output: Path, size: Size) -> None:
    from deepseek_training.recipes.loading import load_recipe
    from deepseek_training.stages.adapt import AdaptRecipe, adapt

    model = output.parent / "pretrain" / "model"
    adapt(load_recipe(f"adapt-{size.recipe_suffix}", AdaptRecipe, {"model": str(model)}), output)


def _sft(output: Path, size: Size) -> None:
    from deepseek_training.recipes.loading import load_recipe
    from deepseek_training.recipes.sft import SftRecipe
    from deepseek_training.stages.sft import sft

    model = output.parent / "adapt" / "model"
    sft(load_recipe(f"sft-{size.recipe_suffix}", SftRecipe, {"model": str(model)}), output)


def _align(output: Path, size: Size) -> None:
    from deepseek_training.recipes.loading import load_recipe
    from deepseek_training.stages.align import AlignRecipe, align

    settings = {"model": str(output.parent / "sft" / "model"), "prompt_template": None}  # the template that sft saved
    align(load_recipe(f"align-{size.recipe_suffix}", AlignRecipe, settings), output)


def _evaluate(output: Path, size: Size) -> None:
    from deepseek_eval.harness import evaluate_model

    evaluate_model(
        str(output.parent / "align" / "model"),
        tasks=("mmlu", "humaneval"),
        limit=size.limit,
        max_new_tokens=size.max_new_tokens,
        output=output,
    )


STAGES: dict[str, Callable[[Path, Size], Any]] = {
    "pretrain": _pretrain,
    "adapt": _adapt,
    "sft": _sft,
    "align": _align,
    "evaluate": _evaluate,
}


def _close(root: Path, size: Size) -> list[str]:
    """Write card and report, print the table, and return the targets that were missed."""
    from deepseek_model_cards.benchmarks import compare_to_chance
    from deepseek_model_cards.card.card import write_card
    from deepseek_model_cards.report.report import summary_table, write_report
    from deepseek_records.run_folder import RunFolder

    summaries = [RunFolder(root / name).summary for name in STAGES]
    try:
        card = write_card(root)
    except FileExistsError as error:  # somebody's edits, which stay
        card = root / "README.md"
        print(f"\nthe model card stays as it is: {error}")
    report = write_report(root, root / "report.html", with_items=True)
    print()
    print(summary_table(root))
    print("\nA model of this size is at chance; its benchmark scores show that the harness runs, not what it knows:")
    for row in RunFolder(root / "evaluate").summary.results:
        error = "" if row.stderr is None else f"standard error {row.stderr:.3f}, "  # None: one question per subject.
        score = f"{row.value:.3f} ({error}n {row.n})"
        print(f"  {row.dataset} {row.metric}: {score}, {compare_to_chance(row)}")
    print(f"\nmodel card  {card}\nreport      {report}\nmodel       {root / 'align' / 'model'}")
    seconds, memory_gib = _cost(summaries)
    print(f"\nstages took {seconds:.0f} s; this process took at most {memory_gib:.1f} GiB")
    if size.has_targets and (seconds > STATED_SECONDS or memory_gib > STATED_MEMORY_GIB):
        stated = f"{STATED_SECONDS} s or {STATED_MEMORY_GIB:g} GiB"
        print(f"note: that is more than the {stated} of two idle CPU cores; a slow or busy machine takes longer")
    return [name for summary in summaries for name in summary.missed] if size.has_targets else []


def _cost(summaries: list[Summary]) -> tuple[float, float]:
    """Seconds of all stages, also those of an earlier run, and this process's most memory in GiB."""
    import resource

    seconds = sum(summary.seconds for summary in summaries)
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB.
