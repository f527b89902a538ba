"""``deepseek-moe data``: clean, deduplicate, decontaminate, mask, split and describe text, from a recipe.

Joins the parts that do not know each other: the filters are training's, the benchmarks' items evaluation's.
"""

import argparse
import importlib.util
from typing import TYPE_CHECKING, Any

from deepseek_cli.stage_command import add_run_arguments

if TYPE_CHECKING:
    from deepseek_records.summary import Summary
    from deepseek_training.recipes.data import DataRecipe

HELP = "Clean text before training: repair, filter, deduplicate, decontaminate, mask, split."
EXAMPLES = """
  deepseek-moe data data-debug --output runs/clean
  deepseek-moe data data-debug --sources "[{path: my_texts/, license: CC BY 4.0}]" --languages "[en]" --dry-run
  deepseek-moe data my_data.yaml --workers 4 --output runs/clean
  deepseek-moe pretrain pretrain-debug --data runs/clean/data --output runs/first

An interrupted run goes on when the same command is given again.
"""
# A question of fewer words is not told from ordinary language without its options.
_FEW_WORDS = 13
# Import name to distribution, of what the extra `data` installs.
_NEEDS = {
    "ftfy": "ftfy",
    "py3langid": "py3langid",
    "datasketch": "datasketch",
    "stdnum": "python-stdnum",
    "mlcroissant": "mlcroissant",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the recipe, its settings and where to write."""
    from deepseek_training.recipes.data import DataRecipe
    from deepseek_training.recipes.loading import add_recipe_arguments

    add_recipe_arguments(parser, DataRecipe)
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes; the result is the same")
    add_run_arguments(parser, "runs/data")


def run(args: argparse.Namespace) -> int:
    """Clean, and print what each filter did."""
    from deepseek_training.recipes.data import DataRecipe
    from deepseek_training.recipes.loading import collect_overrides, load_recipe

    recipe = load_recipe(args.recipe, DataRecipe, collect_overrides(args))
    if args.workers < 1:
        raise ValueError(f"workers: got {args.workers}, expected at least 1")
    missing = [name for module, name in _NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"data: got no {', '.join(missing)}, expected the extra: pip install 'deepseek-moe[data]'")

    from deepseek_training.stages.clean_data import clean_data

    benchmarks = collect_benchmarks(recipe) if "contamination" in recipe.filters else {}
    summary = clean_data(
        recipe, args.output, benchmarks, workers=args.workers, overwrite=args.overwrite, is_dry=args.dry_run
    )
    if summary is not None:
        print(describe(summary))
        print(f"data in {args.output}/data after {summary.seconds:.0f} s; what was dropped in {args.output}/dropped")
    return 0


def collect_benchmarks(recipe: "DataRecipe") -> dict[str, list[tuple[str, str]]]:
    """Return the items of the tasks that a recipe names, each with what a leak of it would hold.

    Tasks that ask another's questions are not searched for twice. Those that are not embedded are left out unless the
    recipe names them or says where their data lie. A line tells of both.

    Args:
        recipe: The settings.

    Raises:
        FileNotFoundError: A task that is named has no data.
        ValueError: There is no such task.
    """
    from deepseek_eval.tasks.catalogue import TASKS, find_task
    from deepseek_eval.tasks.rows import find_source

    known = {name: find_source(place) for name, place in recipe.benchmark_data.items()}
    tasks = {name: find_task(name) for name in recipe.benchmark_names(TASKS)}
    found: dict[str, list[tuple[str, str]]] = {}
    absent, without_text = [], []
    for name, task in tasks.items():
        if task.shares_answers_with in tasks and name not in known:
            continue
        if task.kind == "media":
            if recipe.benchmarks is not None or name in known:
                raise ValueError(
                    f"benchmarks: got {name}, expected tasks of text; a text cannot leak its pictures or sounds"
                )
            without_text.append(name)
            continue
        try:
            items = task.build_items(0, None, known.get(name))
            found[name] = [part for item in items for part in leaked_parts(item)]
        except (FileNotFoundError, ValueError):  # the latter of a task that asks whatever text it is given
            if recipe.benchmarks is not None or name in known:
                raise
            absent.append(name)
    if absent:
        print(f"not searched for, since their data are not embedded: {', '.join(absent)} (set benchmark_data)")
    if without_text:
        print(f"not searched for, since they ask about pictures or sounds: {', '.join(without_text)}")
    return found


def leaked_parts(item: Any) -> list[tuple[str, str]]:
    """Return what a text that leaks a benchmark's item may hold, each part with its id.

    The question stands without what all items of the task share and without lettered options, which a copy seldom has;
    a short question keeps its options. Of a program the request, the solution and the tests are parts.

    Args:
        item: Of a task.
    """
    question = str(item.prompt.removeprefix(item.context))
    if hasattr(item, "tests"):
        question = question.partition("here is your task: ")[2] or question
        question = question.partition(" Your code should pass these tests")[0]
        parts = {"": question, "/solution": item.target, "/tests": item.tests}
        return [(f"{item.id}{name}", text) for name, text in parts.items() if text.strip()]
    stem, options, _ = question.partition("\nA. ")
    is_short = len(stem.split()) < _FEW_WORDS
    return [(str(item.id), question.removesuffix("\nAnswer:") if options and is_short else stem)]


def describe(summary: "Summary") -> str:
    """Return the table of filters as text.

    Args:
        summary: Of a finished run.
    """
    rows = [f"{'filter':<18}{'documents in':>13}{'dropped':>9}{'share':>8}{'changed':>9}"]
    for row in summary.details["filters"]:
        share = row["num_dropped"] / row["num_in"] if row["num_in"] else 0.0
        rows.append(
            f"{row['name']:<18}{row['num_in']:>13,}{row['num_dropped']:>9,}{share:>8.1%}{row['num_changed']:>9,}"
        )
    for use in summary.data:
        rows.append(f"{use.name}: {use.num_rows:,} documents, {(use.num_bytes or 0) / 1e6:.2f} MB for {use.split}")
    return "\n".join(rows)
