"""The page of ``deepseek-moe explain``: one self-contained HTML file with heatmaps, drawn from ``explain.json`` alone.

No requests and no script. A heatmap is a table, so that its numbers can be copied and are read aloud.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_model_cards.report.charts import line_chart
from deepseek_model_cards.report.masking_maps import SURE, Cell, ablation_map, color_cell, set_map
from deepseek_model_cards.wording import format_count, format_seconds, format_value
from deepseek_records.json_files import read_object
from deepseek_records.run_folder import write_text

TEMPLATES = Path(__file__).parent / "templates"
_LEAST_LIFT = 1.3


def write_explanation(run_path: str | Path, output: str | Path) -> Path:
    """Write the page of a run of ``explain`` and return its path.

    Args:
        run_path: The run's folder.
        output: The HTML file.

    Raises:
        FileNotFoundError: The folder holds no ``explain.json``.
    """
    import jinja2

    found = read_object(Path(run_path) / "explain.json", "run")
    environment = jinja2.Environment(autoescape=True, loader=jinja2.FileSystemLoader(TEMPLATES))
    page = environment.get_template("explain.html").render(
        title=f"What the experts of {_name(found['model'])} do",
        subtitle=f"{found['architecture']}, {found['model']}, {format_seconds(found['seconds'])}",
        tiles=_tiles(found),
        domain_maps=[_domain_map(layer, found["atlas"]) for layer in found["atlas"]["layers"]],
        information=[_information_row(layer) for layer in found["atlas"]["layers"]],
        ablation=ablation_map(found),
        sets=set_map(found),
        other_maps=[_other_maps(layer, found["atlas"]) for layer in found["atlas"]["layers"]],
        experts=[_expert_rows(layer) for layer in found["atlas"]["layers"]],
        texts=[_text_view(text) for text in found["texts"]],
        faithfulness=_faithfulness_view(found),
        atlas=found["atlas"],
    )
    write_text(Path(output), page)
    return Path(output)


def _name(model: str) -> str:
    path = Path(model)
    return path.parent.name if path.name == "model" and path.parent.name else path.name or model


def _lift_cell(lift: float, title: str) -> Cell:
    return color_cell(f"{lift:.1f}", math.log2(max(lift, 0.06)), 2.0, title)


def _tiles(found: Mapping[str, Any]) -> list[dict[str, str]]:
    atlas, ablation = found["atlas"], found["ablation"]
    experts = [expert for layer in atlas["layers"] for expert in layer["experts"]]
    tiles = [
        {
            "name": "text read",
            "value": f"{format_count(sum(atlas['num_tokens']))} tokens",
            "note": f"{sum(atlas['num_documents'])} documents of {len(atlas['domains'])} domains",
        }
    ]
    if len(atlas["domains"]) > 1:
        sure = sum(expert["q_value"] < SURE for expert in experts)
        tiles.append(
            {
                "name": "experts that prefer a domain",
                "value": f"{sure} of {len(experts)}",
                "note": "false discovery rate below 5 %, documents shuffled",
            }
        )
    if ablation:
        cells = [
            (change, effect, name)
            for effect in ablation
            for change, name in zip(effect["change"], atlas["domains"], strict=True)
        ]
        change, effect, name = max(cells, key=lambda cell: cell[0])
        note = f"nats per token of {name}, without expert {effect['expert']} of layer {effect['layer']}"
        tiles.append({"name": "largest loss without one expert", "value": f"{change:+.3f}", "note": note})
    if found["faithfulness"]:
        gain, error = found["faithfulness"]["deletion_gain"]
        note = f"nats over random orders, p = {found['faithfulness']['deletion_p']:.4f}"
        tiles.append({"name": "attributions, by deletion", "value": format_value(gain, error), "note": note})
    return tiles


def _ordered(layer: Mapping[str, Any], domains: Sequence[str]) -> list[Mapping[str, Any]]:
    """Experts of one domain side by side, the most specialized first."""
    return sorted(layer["experts"], key=lambda one: (domains.index(one["domain"]), -max(one["lifts"])))


def _domain_map(layer: Mapping[str, Any], atlas: Mapping[str, Any]) -> dict[str, Any]:
    experts = _ordered(layer, atlas["domains"])
    rows = []
    for number, domain in enumerate(atlas["domains"]):
        cells = []
        for expert in experts:
            rate = format_value(expert["rates"][number], expert["rate_errors"][number])
            title = f"expert {expert['expert']} takes {rate} of the tokens of {domain}, {expert['load']:.3f} of all"
            cells.append(_lift_cell(expert["lifts"][number], title))
        rows.append({"name": domain, "cells": cells})
    return {"title": f"Layer {layer['layer']}", "columns": [one["expert"] for one in experts], "rows": rows}


def _information_row(layer: Mapping[str, Any]) -> list[str]:
    cells = [str(layer["layer"])]
    for name in ("domain", "kind", "place"):
        told = layer[name]
        cells.append("-" if told is None else f"{format_value(told['bits'], told['stderr'])} ({told['chance']:.3f})")
    stable = layer["stability"]
    return [*cells, "-" if stable is None else f"{stable[0]:.3f}, sd {stable[1]:.3f}"]


def _other_maps(layer: Mapping[str, Any], atlas: Mapping[str, Any]) -> list[dict[str, Any]]:
    experts = _ordered(layer, atlas["domains"])
    maps = []
    for key, names, title in (
        ("kind_lifts", atlas["kinds"], "kind of token"),
        ("place_lifts", atlas["places"], "place in the passage"),
    ):
        is_seen = [any(expert[key][number] > 0 for expert in experts) for number in range(len(names))]
        rows = [
            {
                "name": name,
                "cells": [
                    _lift_cell(one[key][number], f"expert {one['expert']}, {name}: {one[key][number]:.3f}")
                    for one in experts
                ],
            }
            for number, name in enumerate(names)
            if is_seen[number]
        ]
        columns = [one["expert"] for one in experts]
        maps.append({"title": f"Layer {layer['layer']}, {title}", "columns": columns, "rows": rows})
    return maps


def _expert_rows(layer: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for expert in layer["experts"]:
        lift = max(expert["lifts"])
        is_plain = lift < _LEAST_LIFT or expert["q_value"] >= SURE
        rows.append(
            {
                "expert": expert["expert"],
                "load": f"{expert['load']:.1%}",
                "prefers": "no domain" if is_plain else f"{expert['domain']}, {lift:.1f} times its share",
                "q": f"{expert['q_value']:.2g}",
                "tokens": [
                    {"text": visible(one["text"]), "title": f"{one['count']} times, {one['lift']:.1f} times its share"}
                    for one in expert["tokens"]
                ],
            }
        )
    return {"layer": layer["layer"], "rows": rows}


def visible(text: str) -> str:
    """Return a token with its spaces and line ends made visible.

    Args:
        text: The token.
    """
    return text.replace(" ", "\u2423").replace("\n", "\u21b5").replace("\t", "\u21e5")


def _chips(tokens: Sequence[str], values: Sequence[float]) -> list[Cell]:
    most = max(map(abs, values)) or 1.0
    return [
        color_cell(visible(token), value, most, f"{visible(token)}: {value:+.4f}")
        for token, value in zip(tokens, values, strict=True)
    ]


def _text_view(text: Mapping[str, Any]) -> dict[str, Any]:
    told = text["attribution"]
    return {
        "chips": _chips(text["tokens"], told["values"]),
        "next": visible(text["next_token"]),
        "chance": f"{math.exp(told['output']):.1%}",
        "note": f"log P = {told['output']:.3f}, {told['baseline']:.3f} where every token is the mean embedding; "
        f"completeness error {told['error']:.1e} after {told['num_steps']} steps",
        "routes": _routes(text),
        "choices": [_choice_view(choice, text["tokens"]) for choice in text["choices"]],
    }


def _routes(text: Mapping[str, Any]) -> dict[str, Any]:
    """Experts of each token in each layer, the heaviest first."""
    rows = []
    for choice in text["choices"]:
        cells = []
        for experts, weights in zip(choice["experts"], choice["weights"], strict=True):
            pairs = sorted(((w, e) for e, w in zip(experts, weights, strict=True) if w > 0), reverse=True)
            title = ", ".join(f"expert {expert}: {weight:.3f}" for weight, expert in pairs)
            cells.append({"text": " ".join(str(expert) for _, expert in pairs), "style": "", "title": title})
        rows.append({"name": f"layer {choice['layer']}", "cells": cells})
    return {"title": "", "columns": [visible(token) for token in text["tokens"]], "rows": rows}


def _choice_view(choice: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    told, parts = choice["attribution"], choice["parts"]
    view = {
        "title": f"Layer {choice['layer']}: why the last token goes to expert {choice['expert']}",
        "chips": _chips(tokens, told["values"]),
        "note": f"its logit is {told['output']:.3f} above the mean over experts, {told['baseline']:.3f} for mean "
        f"embeddings; completeness error {told['error']:.1e}",
        "parts": None,
    }
    if parts is not None:
        most = max(map(abs, parts["values"])) or 1.0
        view["parts"] = [
            {"name": name, "value": f"{value:+.3f}", "width": f"{50 * abs(value) / most:.1f}", "is_more": value > 0}
            for name, value in zip(parts["names"], parts["values"], strict=True)
        ]
    return view


def _faithfulness_view(found: Mapping[str, Any]) -> dict[str, Any] | None:
    tested = found["faithfulness"]
    if tested is None:
        return None
    shares = [100 * share for share in tested["shares"]]
    charts, rows = [], []
    for name, what in (("deletion", "taken away"), ("insertion", "given back")):
        lines = [
            ("by attribution", shares, tested["curves"][name]),
            ("random order", shares, tested["curves"][f"{name}_random"]),
        ]
        panel = {
            "title": name.capitalize(),
            "ylabel": "log P of the next token",
            "xlabel": f"% of tokens {what}",
            "lines": lines,
        }
        charts.append({"source": line_chart(panel), "alt": f"{name} curves by attribution and by random orders"})
        gain = format_value(*tested[f"{name}_gain"])
        rows.append([name, gain, f"{tested[f'{name}_p']:.4f}"])
    return {
        "charts": charts,
        "rows": rows,
        "num_texts": tested["num_texts"],
        "most_error": f"{tested['most_error']:.1e}",
    }
