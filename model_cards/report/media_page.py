"""The page of an evaluation on images and sounds: accuracy beside its controls, examples, experts by kind of token.

One self-contained HTML file without script: pictures and sounds are inside. Called by ``deepseek-moe evaluate``.
"""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_model_cards.report.explain_page import TEMPLATES
from deepseek_model_cards.report.masking_maps import color_cell
from deepseek_model_cards.wording import format_value
from deepseek_records.json_files import read_object
from deepseek_records.media.pictures import file_name
from deepseek_records.run_folder import write_text

_NUM_EXAMPLES = 12


def write_media_page(run_path: str | Path, output: str | Path) -> Path | None:
    """Write the page of a run of ``evaluate``; None where no task was about images or sounds.

    Args:
        run_path: The run's folder.
        output: The HTML file.

    Raises:
        FileNotFoundError: The folder holds no ``results.json``.
    """
    import jinja2

    run = Path(run_path)
    found = read_object(run / "results.json", "run")
    tasks = {name: scores for name, scores in found["tasks"].items() if "acc_blind" in scores}
    if not tasks:
        return None
    environment = jinja2.Environment(autoescape=True, loader=jinja2.FileSystemLoader(TEMPLATES))
    page = environment.get_template("media.html").render(
        title="What the model sees and hears",
        subtitle=f"{found['model']}; greedy answers to held-out questions",
        rows=[_row(name, scores) for name, scores in tasks.items()],
        groups=[_row(f"{name}: {group}", part) for name, one in tasks.items() for group, part in _groups(one)],
        examples=[_examples(run, name) for name in tasks],
        experts=[_experts(name, scores["experts"]) for name, scores in tasks.items() if "experts" in scores],
    )
    write_text(Path(output), page)
    return Path(output)


def _groups(scores: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    groups = scores.get("groups", {})
    return list(groups.items()) if len(groups) > 1 else []


def _row(name: str, scores: Mapping[str, Any]) -> dict[str, str]:
    names = {"right": "acc", "blind": "acc_blind", "exchanged": "acc_exchanged"}
    names |= {"commonest": "acc_commonest", "gain": "gain_over_commonest"}
    cells = {cell: format_value(scores[key], scores[f"{key}_stderr"]) for cell, key in names.items()}
    return {"name": name, "n": f"{scores['n']:,}", **cells}


def _examples(run: Path, task: str) -> dict[str, Any]:
    """The first answers that are right and the first that are wrong, of those whose media were kept."""
    rows = [json.loads(line) for line in (run / f"samples_{task}.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [row for row in rows if (run / "media" / task / f"{file_name(row['id'])}.png").is_file()]
    prompts = _prompts(run, task)
    return {
        "task": task,
        "right": [_example(run, task, row, prompts) for row in kept if row["acc"]][:_NUM_EXAMPLES],
        "wrong": [_example(run, task, row, prompts) for row in kept if not row["acc"]][:_NUM_EXAMPLES],
        "num_wrong": sum(not row["acc"] for row in rows),
    }


def _prompts(run: Path, task: str) -> dict[str, str]:
    import gzip

    with gzip.open(run / f"prompts_{task}.jsonl.gz", "rt", encoding="utf-8") as file:
        return {row["id"]: row["prompt"] for row in map(json.loads, file)}


def _example(run: Path, task: str, row: Mapping[str, Any], prompts: Mapping[str, str]) -> dict[str, str]:
    folder, name = run / "media" / task, file_name(row["id"])
    sound = folder / f"{name}.wav"
    return {
        "picture": _inline(folder / f"{name}.png", "image/png"),
        "sound": _inline(sound, "audio/wav") if sound.is_file() else "",
        "prompt": prompts.get(row["id"], ""),
        "answer": row["prediction"] or "(nothing)",
        "target": row["target"],
        "blind": row["prediction_blind"] or "(nothing)",
    }


def _inline(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _experts(task: str, found: Mapping[str, Any]) -> dict[str, Any]:
    maps = []
    for layer in found["layers"]:
        rates = layer["rates"]
        mean = [sum(column) / len(column) for column in zip(*rates, strict=True)]
        rows = [
            {
                "name": f"{kind} ({number:,} tokens)",
                "cells": [
                    color_cell(f"{rate:.0%}", rate - middle, 0.5, f"expert {expert}: {rate:.1%} of {kind} tokens")
                    for expert, (rate, middle) in enumerate(zip(of_kind, mean, strict=True))
                ],
            }
            for kind, number, of_kind in zip(found["kinds"], found["num_tokens"], rates, strict=True)
        ]
        told = f"{layer['bits']:.3f} bits on the kind per choice; {layer['bits_by_chance']:.3f} by chance"
        maps.append({"title": f"Layer {layer['layer']}: {told}", "rows": rows, "columns": list(range(len(mean)))})
    return {"task": task, "maps": maps}
