"""Heatmaps of what masking experts does, for the page of ``deepseek-moe explain``."""

import math
from collections.abc import Mapping
from typing import Any

from deepseek_model_cards.report.charts import CELL_INK, CELL_LIGHT
from deepseek_model_cards.wording import format_value

# Below this false discovery rate a change gets a star.
SURE = 0.05
_MORE, _LESS = (178, 60, 23), (33, 94, 160)

Cell = dict[str, str]


def color_cell(text: str, value: float, most: float, title: str) -> Cell:
    """Return a heatmap's cell: orange above zero, blue below, white at zero.

    Args:
        text: What it shows.
        value: What colors it.
        most: The value of the full color.
        title: What a pointer over it tells.
    """
    share = max(-1.0, min(1.0, value / most if most else 0.0))
    tone = _MORE if share > 0 else _LESS
    red, green, blue = (round(255 + abs(share) * (part - 255)) for part in tone)
    ink = CELL_LIGHT if abs(share) > 0.62 else CELL_INK
    return {"text": text, "style": f"background:#{red:02x}{green:02x}{blue:02x};color:{ink}", "title": title}


def ablation_map(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the map of single masked experts by domain, None where none was masked.

    Args:
        found: What ``explain.json`` holds.
    """
    effects, domains = found["ablation"], found["atlas"]["domains"]
    if not effects:
        return None
    most = [max(abs(effect["change"][number]) for effect in effects) for number in range(len(domains))]
    rows = []
    for effect in sorted(effects, key=lambda one: -max(map(abs, one["change"]))):
        cells = []
        for number, domain in enumerate(domains):
            change, error, q_value = (effect[name][number] for name in ("change", "stderr", "q_value"))
            is_sure = q_value is not None and q_value < SURE
            title = f"{domain}: {change:+.5f}" + ("" if error is None else f" \u00b1 {error:.5f}, q = {q_value:.2g}")
            title += f"; first-order estimate {effect['estimate'][number]:+.5f}"
            text = f"{change:+.3f}" + ("*" if is_sure else "")
            scaled = math.copysign(math.sqrt(abs(change)), change)  # so that small changes are seen beside large ones
            cells.append(color_cell(text, scaled, math.sqrt(most[number]), title))
        rows.append({"name": f"layer {effect['layer']}, expert {effect['expert']}", "cells": cells})
    return {"title": "", "columns": domains, "rows": rows}


def set_map(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the map of each domain's preferred experts masked together beside random sets, None without.

    Args:
        found: What ``explain.json`` holds.
    """
    sets, domains = found.get("sets"), found["atlas"]["domains"]
    if not sets:
        return None
    most = max(abs(change) for one in sets for change in (*one["change"], *one["control_change"]))
    rows = []
    for one in sets:
        ratio = "-" if one["ratio"] is None else format_value(one["ratio"], one["ratio_stderr"])
        for key, name in (("", f"without {', '.join(one['experts'])}"), ("control_", "random sets of equal load")):
            cells = []
            for number, domain in enumerate(domains):
                change, error = one[f"{key}change"][number], one[f"{key}stderr"][number]
                title = f"{domain}: {change:+.5f}" + ("" if error is None else f" \u00b1 {error:.5f}")
                cells.append(color_cell(f"{change:+.3f}", change, most, title))
            cells.append({"text": f"{one[f'{key}domain_load']:.1%}", "style": "", "title": "of the domain's routing"})
            cells.append({"text": "" if key else ratio, "style": "", "title": "own domain, over random sets"})
            rows.append({"name": f"{one['domain']}: {name}", "cells": cells})
    return {"title": "", "columns": [*domains, "of its routing", "times random"], "rows": rows}
