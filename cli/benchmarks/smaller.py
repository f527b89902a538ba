"""Size on disk against bits per byte, for every way to make one model smaller.

``deepseek-moe bench smaller MODEL`` makes the variants of `smaller_variants.py`, loads each as it is stored, and
compares it with the original on the same windows of held-out text: the errors are those of the pairs. ``table.txt``,
``results.json`` and ``plots/smaller.png`` lie in the run folder, the models in its ``variants/``.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch

from deepseek_cli.benchmarks.result_files import BenchmarkRun
from deepseek_cli.benchmarks.smaller_picture import draw_picture
from deepseek_cli.benchmarks.smaller_variants import Variant, Workshop, cut_settings
from deepseek_records.loading import load_tokenizer
from deepseek_records.output_paths import check_output
from deepseek_training.compress.divergence import Reference
from deepseek_training.compress.student import plan_cut_student, read_config
from deepseek_training.data.corpus import Corpus
from deepseek_training.data.texts import data_name
from deepseek_training.recipes.distill import DistillRecipe
from deepseek_training.recipes.loading import load_recipe, recipe_settings
from deepseek_training.recipes.quantize import QuantizeSettings
from deepseek_training.stages.quantize import check_model
from deepseek_training.trainer.held_out import HeldOut


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant, measured.

    Attributes:
        name: As printed.
        kind: See `smaller_variants`.
        label: Among those of its kind.
        num_bytes: Of the weights' files.
        bits_per_byte: On the held-out text.
        difference: Of that to the original.
        difference_stderr: Its standard error, over the pairs of windows.
        kl: To the original, nats per token.
        is_on_frontier: Whether no other variant is both smaller and better.
    """

    name: str
    kind: str
    label: str
    num_bytes: int
    bits_per_byte: float
    difference: float
    difference_stderr: float
    kl: float
    is_on_frontier: bool = False


def run(args: argparse.Namespace) -> int:
    """Make and measure the variants, then print and write the table and draw the picture.

    Args:
        args: The options of ``deepseek-moe bench smaller``.

    Raises:
        ValueError: An option or a model that cannot work, before anything is written.
    """
    check_output(args.output)
    healing = load_recipe(args.recipe, DistillRecipe, {"seed": args.seed, "report_to": []})
    rounding = QuantizeSettings(
        model=args.model,
        group_size=args.group,
        calibration_tokens=args.calibration_tokens,
        data=healing.data,
        data_column=healing.data_column,
        sequence_length=healing.sequence_length,
        eval_bytes=args.eval_bytes,
    )
    check_cuts(args.cuts)
    config = read_config(args.model)
    check_model(config, rounding)
    for percent in args.cuts:
        plan_cut_student(config, cut_settings(config, percent))
    tokenizer, corpus = load_tokenizer(args.model), Corpus.load(healing.data, healing.data_column)
    settings = {"cuts": args.cuts, "rounding": recipe_settings(rounding), "healing": recipe_settings(healing)}
    bench = BenchmarkRun("smaller", args.output, {"model": args.model, **settings}, overwrite=args.overwrite)
    held_out = HeldOut.prepare(data_name(healing.data), corpus.validation, tokenizer, args.eval_bytes)
    workshop = Workshop(args.model, bench.folder.path / "variants", rounding, args.cuts, healing)
    rows: list[Row] = []
    reference = None
    for variant in workshop.make():
        if reference is None:
            reference = Reference.of(variant.load(), held_out, rounding)
        began = time.monotonic()
        rows.append(measure(variant, reference))
        print(f"  {variant.name}: {rows[-1].bits_per_byte:.4f} ({time.monotonic() - began:.0f} s)", flush=True)
    rows = mark_frontier(rows)
    table = format_table(rows)
    print(table)
    draw_picture(rows, bench.folder.path / "plots" / "smaller.png")
    figures = {"rows": [dataclasses.asdict(row) for row in rows], "num_bytes_of_text": held_out.num_bytes}
    bench.finish({**figures, "num_windows": len(reference.nats) if reference else 0}, table)
    return 0


def check_cuts(cuts: Sequence[int]) -> None:
    """Refuse shares that are none.

    Args:
        cuts: In percent.

    Raises:
        ValueError: One is out of range, or there twice.
    """
    for percent in cuts:
        if not 0 < percent < 100:
            raise ValueError(f"cuts: got {percent}, expected percents between 0 and 100")
    if len(set(cuts)) < len(cuts):
        raise ValueError(f"cuts: got {', '.join(map(str, cuts))}, expected each once")


@torch.no_grad()
def measure(variant: Variant, reference: Reference) -> Row:
    """Return what a variant takes and what it loses.

    Args:
        variant: As it is stored.
        reference: What the original says.
    """
    model: Any = variant.load()
    found = reference.compare(model)
    return Row(
        variant.name,
        variant.kind,
        variant.label,
        variant.num_bytes,
        found.after.value,
        found.difference.value,
        found.difference.stderr,
        found.divergence,
    )


def mark_frontier(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with those marked that no other one beats in size and bits per byte together.

    Args:
        rows: Any order.
    """

    def is_beaten(row: Row) -> bool:
        place = row.num_bytes, row.bits_per_byte
        return any(
            (other.num_bytes, other.bits_per_byte) != place
            and other.num_bytes <= row.num_bytes
            and other.bits_per_byte <= row.bits_per_byte
            for other in rows
        )

    return [dataclasses.replace(row, is_on_frontier=not is_beaten(row)) for row in rows]


def format_table(rows: Sequence[Row]) -> str:
    """Return the table in Markdown.

    Args:
        rows: The original first.
    """
    lines = [
        "| variant | MB | of the original | bits per byte | difference, paired | KL | frontier |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        is_first = row is rows[0]
        change = "" if is_first else f"{row.difference:+.4f} ± {row.difference_stderr:.4f}"
        lines.append(
            f"| {row.name} | {row.num_bytes / 1e6:.2f} | {row.num_bytes / rows[0].num_bytes:.3f} | "
            f"{row.bits_per_byte:.4f} | {change} | {'' if is_first else f'{row.kl:.4f}'} | "
            f"{'yes' if row.is_on_frontier else ''} |"
        )
    return "\n".join(lines)
