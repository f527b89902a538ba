"""``deepseek-moe explain``: what a model's experts and inputs contribute, by `deepseek_eval.interpret`."""

import argparse
from pathlib import Path
from typing import Any

HELP = "Show what each expert takes, what is lost without it, and what drove a prediction."
EXAMPLES = """
  deepseek-moe explain runs/demo/align
  deepseek-moe explain runs/demo/align --text "The doctor told the patient that" --experts 8 --output runs/one-text
  deepseek-moe explain path/to/model --data books,my_texts --passages 12 --output runs/explain-mine
  deepseek-moe explain runs/demo/adapt --mask 1:2,2:5 --faithfulness 0 --output runs/masked
"""
_DATA = "books,medicine,dialogues,dialogues_zh"
_MOST_ROWS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, run folder, or Hub id, of any MoE family")
    parser.add_argument(
        "--text", action="append", default=None, help="a text whose next token and routing to explain; may be repeated"
    )
    parser.add_argument(
        "--data",
        default=_DATA,
        metavar="NAMES",
        help="domains: embedded names, files, folders or Hub ids, with commas",
    )
    parser.add_argument("--data-column", default=None, metavar="NAME", help="the column with the text")
    parser.add_argument("--passages", type=int, default=24, metavar="N", help="passages of each domain")
    parser.add_argument("--length", type=int, default=128, metavar="N", help="tokens of a passage")
    parser.add_argument(
        "--experts",
        default="16",
        metavar="N",
        help="how many to mask, most salient first; `all`, or 0 for none",
    )
    parser.add_argument("--mask", default=None, metavar="LAYER:EXPERT", help="mask these instead, comma-separated")
    parser.add_argument(
        "--set-size",
        type=int,
        default=None,
        metavar="N",
        help="mask the N experts that prefer a domain most, together; 0: none (default: 5, of few experts fewer)",
    )
    parser.add_argument(
        "--faithfulness", type=int, default=16, metavar="N", help="texts to test attributions on; 0: none"
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="passages at once")
    parser.add_argument("--seed", type=int, default=0, help="of passages and shufflings")
    parser.add_argument("--output", default="runs/explain", metavar="DIR", help="run folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is in the way")
    group = parser.add_argument_group("loading")
    group.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="weights' type"
    )
    group.add_argument("--device", default=None, help="torch device (the first GPU, else the CPU)")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")


def parse_experts(text: str | None) -> tuple[tuple[str, int], ...]:
    """Return layer and expert of each part of ``--mask``.

    Args:
        text: For example ``1:2,2:5``.

    Raises:
        ValueError: It is not of that form.
    """
    pairs = [part.strip().partition(":") for part in (text or "").split(",") if part.strip()]
    if not all(layer.strip() and expert.strip().isdigit() for layer, _, expert in pairs) or (text and not pairs):
        raise ValueError(f"--mask: got {text!r}, expected LAYER:EXPERT pairs such as 1:2,2:5")
    return tuple((layer.strip(), int(expert)) for layer, _, expert in pairs)


def run(args: argparse.Namespace) -> int:
    """Explain, and print where to look first.

    Returns:
        0.
    """
    masked = parse_experts(args.mask)
    if args.experts != "all" and not args.experts.isdigit():
        raise ValueError(f"--experts: got {args.experts!r}, expected a number, or all")
    sources = [part.strip() for part in args.data.split(",") if part.strip()]
    if not sources:
        raise ValueError("--data: got no name, expected at least one domain")

    from deepseek_eval.interpret.explain import ExplainSettings, explain
    from deepseek_model_cards.report.explain_page import write_explanation
    from deepseek_records.loading import resolve_checkpoint
    from deepseek_training.data.texts import describe_data, load_texts

    resolve_checkpoint(args.model)
    settings = ExplainSettings(
        texts=tuple(args.text or ()),
        passages=args.passages,
        length=args.length,
        num_experts=10**9 if args.experts == "all" else int(args.experts),
        experts=masked,
        set_size=args.set_size,
        num_faithful=args.faithfulness,
        batch_size=args.batch_size,
        seed=args.seed,
        dtype=args.dtype,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    )
    settings.check()
    texts = [load_texts(source, "all", column=args.data_column) for source in sources]
    used = [describe_data(source, "all", rows, "evaluation") for source, rows in zip(sources, texts, strict=True)]
    domains = dict(zip(_name_domains(sources), texts, strict=True))
    found = explain(args.model, domains, settings, output=args.output, overwrite=args.overwrite, data=used)
    page = write_explanation(args.output, Path(args.output) / "explain.html")
    print(format_explanation(found))
    print(f"\nWritten to {args.output}: explain.json and {page.name}")
    return 0


def _name_domains(sources: list[str]) -> list[str]:
    """A name for each source; where two would be equal, all get their folder in front."""
    from deepseek_training.data.texts import data_name

    names = [data_name(source) for source in sources]
    if len(set(names)) < len(names):
        names = [f"{Path(one).absolute().parent.name}-{name}" for one, name in zip(sources, names, strict=True)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"--data: got {twice} twice, expected different domains")
    return names


def format_explanation(found: dict[str, Any]) -> str:
    """Return the main figures as small tables.

    Args:
        found: What ``explain.json`` holds.
    """
    atlas = found["atlas"]
    layout = "{:<7}{:>16}{:>9}{:>9}{:>12}"
    lines = [layout.format("layer", "bits on domain", "chance", "p", "stability")]
    for layer in atlas["layers"]:
        told, stable = layer["domain"], layer["stability"]
        cells = ["-"] * 3
        if told is not None:
            bits = f"{told['bits']:.3f} +- {told['stderr']:.3f}"
            cells = [bits, f"{told['chance']:.3f}", f"{told['p_value']:.3f}"]
        lines.append(layout.format(layer["layer"], *cells, "-" if stable is None else f"{stable[0]:.3f}"))
    if found["ablation"]:
        lines += ["", "loss without an expert, nats per token (its router chooses among the rest)"]
        width = max(12, *(len(name) + 2 for name in atlas["domains"])) + 6
        lines.append("layer expert" + "".join(f"{name:>{width}}" for name in atlas["domains"]))
    for effect in found["ablation"][:_MOST_ROWS]:
        cells = [
            f"{change:+.4f}" + ("" if error is None else f" +- {error:.4f}")
            for change, error in zip(effect["change"], effect["stderr"], strict=True)
        ]
        lines.append(f"{effect['layer']:>5} {effect['expert']:>6}" + "".join(f"{cell:>{width}}" for cell in cells))
    lines += format_sets(found)
    tested = found["faithfulness"]
    if tested is not None:
        for name in ("deletion", "insertion"):
            gain, error = tested[f"{name}_gain"]
            spread = "" if error is None else f" +- {error:.3f}"
            line = f"{name}: better than random orders by {gain:.3f}{spread} nats, p = {tested[f'{name}_p']:.4f}"
            lines += ["", line] if name == "deletion" else [line]
        lines.append(f"largest completeness error of {tested['num_texts']} texts: {tested['most_error']:.1e}")
    elif found["settings"]["num_faithful"]:
        lines += ["", "attributions were not tested: no captum; pip install 'deepseek-moe[explain]'"]
    return "\n".join(lines)


def format_sets(found: dict[str, Any]) -> list[str]:
    """Return what masking each domain's preferred experts together does, as lines.

    Args:
        found: What ``explain.json`` holds.
    """
    if not found["sets"]:
        return []
    domains = found["atlas"]["domains"]
    size, controls = len(found["sets"][0]["experts"]), found["sets"][0]["num_controls"]
    lines = ["", f"loss without the {size} experts that prefer a domain, beside {controls} random sets of equal load"]
    layout = "{:<16}{:>20}{:>20}{:>18}{:>25}"
    lines.append(layout.format("domain", "these", "random", "times as much", "share of its routing"))
    for one in found["sets"]:
        place = domains.index(one["domain"])
        cells = [
            _with_error(one[f"{key}change"][place], one[f"{key}stderr"][place], "+.4f") for key in ("", "control_")
        ]
        cells.append("-" if one["ratio"] is None else _with_error(one["ratio"], one["ratio_stderr"], ".2f"))
        cells.append(f"{one['domain_load']:.1%} and {one['control_domain_load']:.1%}")
        lines.append(layout.format(one["domain"], *cells))
    return lines


def _with_error(value: float, error: float | None, spec: str) -> str:
    return f"{value:{spec}}" + ("" if error is None else f" +- {error:{spec.lstrip('+')}}")
