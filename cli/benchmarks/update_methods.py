"""Five updates in sequence by ten methods: what is gained, what is forgotten, over seeds.

``deepseek-moe bench update`` pretrains a small model on dialogues for each seed, then teaches it books, medicine,
finance, Chinese prose and Python one after another by each method, at equal tokens. It may be stopped at any time; the
same command again goes on behind the last finished method.

With R[i][j] the bits per byte on text j after update i (0: before the first; text 0 is the first model's own):

    final      mean_j R[5][j]                                what the last model is worth on all six texts
    learned    mean_{j>0} (R[0][j] - R[j][j])                what a text has gained once it was taught
    forgotten  mean_{j<5} (R[5][j] - R[j][j])                minus backward transfer (Lopez-Paz and Ranzato, 2017)
    forward    mean_{j>1} (R[0][j] - R[j-1][j])              what earlier updates gave to a text before its own

A second table has how far the routers moved in each update, and a third what the gate said.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from deepseek_cli.benchmarks.result_files import RESULTS_FILE, BenchmarkRun
from deepseek_cli.benchmarks.update_sequence import METHODS, Updated, UpdateSequence
from deepseek_cli.benchmarks.update_texts import FIRST, LATER, read_lesson
from deepseek_records.loading import load_model
from deepseek_records.run_folder import write_json
from deepseek_records.statistics import mean_with_error
from deepseek_training.data.tokenizer import train_tokenizer
from deepseek_training.recipes.pretrain_and_adapt import PretrainRecipe
from deepseek_training.stages.pretrain import pretrain

_LENGTH, _BATCH_SIZE, _HELD_OUT_BYTES, _GATE_BYTES, _VOCABULARY = 64, 16, 24_000, 16_000, 1024
TEXTS = (FIRST, *LATER)
FIGURES = ("final", "learned", "forgotten", "forward")
# By seed and method; "before" has the first model's.
Runs = dict[str, dict[str, list[Updated]]]


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, print the table, and write figures and picture.

    Args:
        args: The options of ``deepseek-moe bench update``.

    Raises:
        ValueError: An option that cannot work.
    """
    methods = args.methods or list(METHODS)
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ValueError(f"methods: got {unknown[0]!r}, expected some of {', '.join(METHODS)}")
    for name in ("seeds", "steps", "first_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: got {getattr(args, name)}, expected at least 1")
    settings = {name: getattr(args, name) for name in ("seeds", "steps", "first_steps")}
    bench = BenchmarkRun("update", args.output, {**settings, "methods": methods}, overwrite=args.overwrite)
    root = bench.folder.path
    runs = _read(root / RESULTS_FILE)
    texts = [read_lesson(name) for name in TEXTS]
    tokenizer = train_tokenizer([text for one in texts for text in one.train], _VOCABULARY)
    bar = tqdm(total=args.seeds * len(methods), desc="update", unit="sequence")
    for seed in range(args.seeds):
        of_seed = runs.setdefault(str(seed), {})
        missing = [name for name in methods if name not in of_seed]
        bar.update(len(methods) - len(missing))
        if not missing:
            continue
        model = _first_model(root, texts[0].train, texts[0].held_out, tokenizer, seed, args.first_steps)
        sizes = {"length": _LENGTH, "held_out_bytes": _HELD_OUT_BYTES, "gate_bytes": _GATE_BYTES}
        lessons = UpdateSequence.prepare(model, tokenizer, texts, **sizes)
        of_seed.setdefault("before", [Updated(lessons.measure(model))])
        for name in missing:
            of_seed[name] = lessons.run(METHODS[name], steps=args.steps, seed=seed, batch_size=_BATCH_SIZE)
            write_json(root / RESULTS_FILE, {"runs": _plain(runs)})
            bar.update()
    bar.close()
    figures = {name: summarize(runs, name) for name in methods}
    tables = [format_table(figures), format_drift(runs, methods), format_gate(runs, methods)]
    table = "\n\n".join(one for one in tables if one)
    print(table)
    from deepseek_cli.benchmarks.update_picture import draw

    (root / "plots").mkdir(exist_ok=True)
    draw(runs, figures, root / "plots" / "update.png")
    bench.finish({"runs": _plain(runs), "figures": figures}, table)
    return 0


def _read(path: Path) -> Runs:
    kept = json.loads(path.read_text())["runs"] if path.is_file() else {}
    return {
        seed: {name: [Updated(**one) for one in rows] for name, rows in of_seed.items()}
        for seed, of_seed in kept.items()
    }


def _plain(runs: Runs) -> dict[str, Any]:
    return {
        seed: {name: [dataclasses.asdict(one) for one in rows] for name, rows in of_seed.items()}
        for seed, of_seed in runs.items()
    }


def _first_model(
    root: Path, train: list[str], held_out: list[str], tokenizer: Any, seed: int, steps: int
) -> PreTrainedModel:
    """A small model that knows the first text, pretrained by the stage itself beside the benchmark's folder."""
    folder = root.with_name(f"{root.name}-first")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text, "split": "train"} for text in train]
    rows += [{"text": text, "split": "validation"} for text in held_out]
    (folder / "dialogues.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer.save_pretrained(folder / "tokenizer")
    recipe = PretrainRecipe(
        data=str(folder / "dialogues.jsonl"),
        tokenizer=str(folder / "tokenizer"),
        preset="debug",
        model={"router_bias_update_speed": 0.01},
        seed=seed,
        sequence_length=_LENGTH,
        batch_size=_BATCH_SIZE,
        max_steps=steps,
        learning_rate=5e-3,
        warmup_steps=min(20, steps),
        logging_steps=min(10, steps),
        eval_bytes=20_000,
        check_bigram=False,
        report_to=[],
    )
    path = folder / f"seed{seed}-{steps}"
    if not (path / "summary.json").is_file():
        pretrain(recipe, path)
    return load_model(path)


def matrix(before: Updated, after: list[Updated]) -> np.ndarray:
    """Return R, `[updates + 1, texts]`.

    Args:
        before: What the first model is worth.
        after: Each update.
    """
    return np.array([[one.bits[name] for name in TEXTS] for one in (before, *after)])


def figures_of(before: Updated, after: list[Updated]) -> dict[str, float]:
    """Return the figures of one sequence; joint training has only the last.

    Args:
        before: What the first model is worth.
        after: Each update.
    """
    table = matrix(before, after)
    found = {"final": float(table[-1].mean())}
    last = len(TEXTS) - 1
    if len(table) == last + 1:
        diagonal = table.diagonal()
        found["learned"] = float(np.mean([table[0, j] - table[j, j] for j in range(1, last + 1)]))
        found["forgotten"] = float(np.mean([table[last, j] - diagonal[j] for j in range(last)]))
        found["forward"] = float(np.mean([table[0, j] - table[j - 1, j] for j in range(2, last + 1)]))
    return found


def summarize(runs: Runs, name: str) -> dict[str, Any]:
    """Return a method's figures, mean and standard error over seeds, and the difference of `final` from naive's.

    Args:
        runs: By seed and method.
        name: The method.
    """
    each = [figures_of(of_seed["before"][0], of_seed[name]) for of_seed in runs.values()]
    found: dict[str, Any] = {key: mean_with_error([one[key] for one in each]) for key in FIGURES if key in each[0]}
    if all("naive" in of_seed for of_seed in runs.values()) and name != "naive":
        naive = [figures_of(of_seed["before"][0], of_seed["naive"])["final"] for of_seed in runs.values()]
        changes = [one["final"] - other for one, other in zip(each, naive, strict=True)]
        found["against_naive"] = mean_with_error(changes)
    return found


def format_table(figures: dict[str, dict[str, Any]]) -> str:
    """Return the table as Markdown.

    Args:
        figures: By method.
    """
    lines = [
        "| method | final, mean of six texts | against naive, paired | learned | forgotten | forward |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in figures.items():
        cells = [_shown(row.get("final"), ".3f"), _shown(row.get("against_naive"), "+.3f")]
        cells += [_shown(row.get(key), "+.3f") for key in ("learned", "forgotten", "forward")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def format_drift(runs: Runs, methods: Sequence[str]) -> str:
    """Return how far the routers moved in each update, as Markdown: mean over texts, mean and error over seeds.

    Args:
        runs: By seed and method.
        methods: The rows; joint training has no single updates.
    """
    lines = [f"| routers moved, nats | {' | '.join(LATER)} |", f"| --- |{' --- |' * len(LATER)}"]
    for name in methods:
        if METHODS[name].is_joint:
            continue
        cells = []
        for place in range(len(LATER)):
            drifts = [list(of_seed[name][place].drift.values()) for of_seed in runs.values()]
            cells.append(_shown(mean_with_error([sum(one) / len(one) for one in drifts]), ".4f"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def format_gate(runs: Runs, methods: Sequence[str]) -> str:
    """Return what the gate said to each update, as Markdown: the alpha that was kept, by seed, or that it refused.

    Args:
        runs: By seed and method.
        methods: Of which those with a gate are told.
    """
    gated = [name for name in methods if METHODS[name].is_gated]
    if not gated:
        return ""
    lines = ["| update | kept at alpha, by seed | refused for |", "| --- | --- | --- |"]
    for name in gated:
        for place, text in enumerate(LATER):
            said = [of_seed[name][place].gate for of_seed in runs.values()]
            kept = ", ".join(f"{one['alpha']:g}" if one["accepted"] else "refused" for one in said)
            lines.append(f"| {text} | {kept} | {'; '.join(why for one in said for why in one['why'])} |")
    return "\n".join(lines)


def _shown(pair: tuple[float, float | None] | None, spec: str) -> str:
    if pair is None:
        return ""
    value, error = pair
    return format(value, spec) if error is None else f"{value:{spec}} ± {error:.3f}"
