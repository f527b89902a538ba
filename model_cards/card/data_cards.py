"""Where a model was trained on text that `deepseek-moe data` cleaned: its sources, licenses, counts and data card.

The figures are those that the training recorded. The card of the data is linked where it still lies near the model's;
it holds samples of text, so an upload does not take it along, and a card for the Hub has no link to it.
"""

import os
from pathlib import Path
from typing import Any

from deepseek_model_cards.card.markdown_cells import escape_cell
from deepseek_model_cards.wording import format_bytes, format_value
from deepseek_records.cleaned_data import CARD_FILE, is_cleaning
from deepseek_records.leaks import scrub
from deepseek_records.lineage import Lineage
from deepseek_records.summary import Cleaning


def cleaning_rows(lineage: Lineage, target: Path | None) -> list[dict[str, Any]]:
    """Return each cleaning that text of the model's stages came from, as ready text.

    Args:
        lineage: The model's stages.
        target: The folder of the model card; None for one that leaves the machine.
    """
    found: dict[str, tuple[Cleaning, list[str]]] = {}
    for stage in lineage.stages.values():
        # As recorded, with the path: what a stage shows has none.
        for use in stage.run.summary.data if stage.is_finished else ():
            if use.cleaning is not None:
                _, names = found.setdefault(use.cleaning.run, (use.cleaning, []))
                names.append(f"{use.name} ({stage.name})")
    return [_row(cleaning, list(dict.fromkeys(names)), target) for cleaning, names in found.values()]


def _row(cleaning: Cleaning, names: list[str], target: Path | None) -> dict[str, Any]:
    sources = [
        {
            "name": one.name,
            "split": one.split or "not stated",
            "num_rows": format_value(one.num_rows),
            "size": format_bytes(one.num_bytes),
            "languages": ", ".join(one.languages) or "-",
            "license": one.license,
            "source": one.source,
        }
        for one in cleaning.sources
    ]
    filters = [
        {
            "name": one.name,
            "before": format_value(one.num_in),
            "dropped": format_value(one.num_dropped),
            "after": format_value(one.num_in - one.num_dropped),
        }
        for one in cleaning.filters
    ]
    tables = {"sources": scrub(sources), "filters": scrub(filters)}
    escaped = {
        name: [{key: escape_cell(text) for key, text in row.items()} for row in rows] for name, rows in tables.items()
    }
    folder = Path(cleaning.run)
    return {
        "data": escape_cell(scrub(", ".join(names))),
        "folder": escape_cell(folder.name),
        "link": _link(folder, target),
        **escaped,
    }


def _link(folder: Path, target: Path | None) -> str:
    """The data card as seen from the model's; empty where it is gone or so far away that its path would tell more."""
    card = folder / CARD_FILE
    if target is None or not card.is_file() or not is_cleaning(folder):
        return ""
    relative = Path(os.path.relpath(card.resolve(), target.resolve()))
    return "" if relative.parts[:2] == ("..", "..") else relative.as_posix().replace(" ", "%20")
