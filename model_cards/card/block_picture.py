"""The picture of one transformer block, drawn from a configuration.

Three panels: the block with its two residual paths, latent attention (MLA), and the router with routed and shared
experts. Every number in it is the configuration's, so the picture in a card cannot disagree with the model. The README
and the docs show the same picture for the ``154b`` preset; the card draws its own.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#1f2933"
MUTED = "#616e7c"
BLUE, GREEN, AMBER, ROSE, GRAY = "#d6e6f7", "#d8efdc", "#fbe8c6", "#f7d9dc", "#eef1f4"
BLUE_EDGE, GREEN_EDGE, AMBER_EDGE, ROSE_EDGE, GRAY_EDGE = "#2f6fb0", "#2f855a", "#b7791f", "#b83246", "#9aa5b1"


def draw_block(config: dict[str, Any], path: str | Path) -> Path:
    """Draw the block of a configuration into a file.

    Args:
        config: The configuration as in ``config.json``; see `describe_block` for the keys used.
        path: The picture; its suffix, ``.svg`` or ``.png``, picks the format.

    Returns:
        The path.
    """
    import matplotlib

    words = describe_block(config)
    settings = {"svg.fonttype": "path", "svg.hashsalt": "block", "font.family": "DejaVu Sans", "font.size": 9}
    with matplotlib.rc_context(settings):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(13, 7.2))
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, 130)
        axes.set_ylim(0, 72)
        axes.axis("off")
        _draw_residual_panel(axes, words)
        _draw_attention_panel(axes, words)
        _draw_experts_panel(axes, words)
        metadata = {"Date": None} if Path(path).suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=110, facecolor="white", metadata=metadata)
    return Path(path)


def describe_block(config: dict[str, Any]) -> dict[str, str]:
    """Return the captions of the picture.

    Args:
        config: The configuration; the keys of `DeepseekV3Config`, and where it is ours ``scoring_func``,
            ``min_experts_per_tok``, ``expert_top_p``, ``target_experts_per_tok``, ``router_key_dim``, ``norm_type``.
            A plain DeepSeek-V3 configuration has none of the latter and reads as sigmoid scores, fixed k, RMSNorm.
    """
    most = config["num_experts_per_tok"]
    least = config.get("min_experts_per_tok") or most
    is_dynamic = least != most
    key_dim = config.get("router_key_dim")
    q_rank = config.get("q_lora_rank")
    dense = config.get("first_k_dense_replace")
    is_softmax = config.get("scoring_func") == "softmax" and config.get("norm_topk_prob", True)
    choose = f"keep {least} to {most}\nby cumulative share" if is_dynamic else f"keep the top {most}"
    score = "softmax over the chosen" if is_softmax else f"{config.get('scoring_func', 'sigmoid')} scores"
    full = config["qk_nope_head_dim"] + config["qk_rope_head_dim"] + config["v_head_dim"]
    return {
        "norm": "LayerNorm" if config.get("norm_type") == "layernorm" else "RMSNorm",
        "layers": f"{config['num_hidden_layers']} layers, hidden size {config['hidden_size']:,}",
        "dense": f"the first {dense if dense > 1 else ''}".rstrip() + " with a dense feed-forward, no experts"
        if dense
        else "every layer has experts",
        "heads": f"{config['num_attention_heads']} heads",
        "query": f"query latent, {q_rank:,}" if q_rank else "query",
        "latent": f"key-value latent, {config['kv_lora_rank']:,}",
        "rope": f"rotary key, {config['qk_rope_head_dim']}",
        "head_dims": f"{config['qk_nope_head_dim']} + {config['qk_rope_head_dim']} a head",
        "value_dim": f"{config['v_head_dim']} a head",
        "cached": f"cached: {config['kv_lora_rank'] + config['qk_rope_head_dim']:,} numbers a token",
        "uncached": f"full keys and values would be {config['num_attention_heads'] * full:,}",
        "gate": f"learned expert keys, {key_dim}" if key_dim else "linear gate",
        "choose": choose,
        "second": choose if is_softmax else score,
        "third": score if is_softmax else choose,
        "routed": f"{config['n_routed_experts']} routed experts, width {config['moe_intermediate_size']:,}",
        "active": f"{least} to {most}" if is_dynamic else f"{most}",
        "shared": f"{config['n_shared_experts']} shared",
    }


def _box(
    axes: "Axes",
    x: float,
    y: float,
    w: float,
    h: float,
    text: str,
    *,
    face: str = GRAY,
    edge: str = GRAY_EDGE,
    **style: Any,
) -> None:
    from matplotlib.patches import FancyBboxPatch

    patch = FancyBboxPatch(
        (x, y), w, h, boxstyle="round,pad=0,rounding_size=0.9", facecolor=face, edgecolor=edge, linewidth=1.3
    )
    axes.add_patch(patch)
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", color=INK, linespacing=1.35, **style)


def _arrow(axes: "Axes", *points: tuple[float, float], color: str = INK, dashed: bool = False) -> None:
    """Draw a line through the points with a head at the last."""
    line = "--" if dashed else "-"
    if len(points) > 2:
        axes.plot(*zip(*points[:-1], strict=True), color=color, linewidth=1.2, linestyle=line, solid_capstyle="round")
    style = {"arrowstyle": "-|>", "color": color, "linewidth": 1.2, "linestyle": line, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=points[-1], xytext=points[-2], arrowprops=style)


def _plus(axes: "Axes", x: float, y: float) -> None:
    from matplotlib.patches import Circle

    axes.add_patch(Circle((x, y), 1.3, facecolor="white", edgecolor=INK, linewidth=1.2, zorder=3))
    axes.text(x, y, "+", ha="center", va="center_baseline", fontsize=12, color=INK, zorder=4)


def _title(axes: "Axes", x: float, text: str, note: str) -> None:
    axes.text(x, 69, text, fontsize=12.5, fontweight="bold", color=INK, va="center")
    axes.text(x, 66, note, fontsize=9, color=MUTED, va="center")


def _draw_residual_panel(axes: "Axes", words: dict[str, str]) -> None:
    _title(axes, 2, "The block", words["layers"])
    axes.text(2, 63.4, words["dense"], fontsize=7.6, color=MUTED, va="center")
    x, w = 8, 17
    middle = x + w / 2
    _box(axes, x, 12, w, 5, words["norm"])
    _box(axes, x, 20, w, 6.5, "latent attention", face=BLUE, edge=BLUE_EDGE)
    _box(axes, x, 37, w, 5, words["norm"])
    _box(axes, x, 45, w, 6.5, "mixture of experts", face=AMBER, edge=AMBER_EDGE)
    axes.text(middle, 4.3, "hidden state of a token", ha="center", color=MUTED)
    for start, end in ((6, 12), (17, 20), (26.5, 30.2), (32.8, 37), (42, 45), (51.5, 55.2), (57.8, 61.5)):
        _arrow(axes, (middle, start), (middle, end))
    for low, high in ((9, 31.5), (34.5, 56.5)):
        _arrow(axes, (middle, low), (4, low), (4, high), (middle - 1.3, high), color=MUTED)
        _plus(axes, middle, high)


def _draw_attention_panel(axes: "Axes", words: dict[str, str]) -> None:
    _title(axes, 34, "Latent attention (MLA)", words["cached"])
    axes.text(34, 63.4, words["uncached"], fontsize=7.6, color=MUTED, va="center")
    blue = {"face": BLUE, "edge": BLUE_EDGE}
    green = {"face": GREEN, "edge": GREEN_EDGE}
    axes.text(55.5, 4.3, "normed hidden state", ha="center", color=MUTED)
    _box(axes, 34, 14, 13, 6.5, words["query"].replace(", ", "\n"), **blue)
    _box(axes, 50, 14, 11, 6.5, words["rope"].replace(", ", "\n"), **green)
    _box(axes, 63, 14, 15, 6.5, words["latent"].replace(", ", "\n"), **green)
    for x in (40.5, 70.5):
        _arrow(axes, (55.5, 6), (55.5, 9.2), (x, 9.2), (x, 14))
    _arrow(axes, (55.5, 6), (55.5, 14))
    _box(axes, 34, 28, 13, 6.5, f"queries\n{words['head_dims']}", **blue)
    _box(axes, 49, 28, 13, 6.5, f"keys\n{words['head_dims']}", **blue)
    _box(axes, 64, 28, 13, 6.5, f"values\n{words['value_dim']}", **blue)
    _arrow(axes, (40.5, 20.5), (40.5, 28))
    _arrow(axes, (55.5, 20.5), (55.5, 28))
    _arrow(axes, (70.5, 20.5), (70.5, 28))
    _arrow(axes, (66, 20.5), (66, 24), (59.5, 24), (59.5, 28))
    _box(axes, 38, 42, 35, 6.5, f"causal softmax attention, {words['heads']}", **blue)
    for x in (40.5, 55.5, 70.5):
        _arrow(axes, (x, 34.5), (x, 42))
    _box(axes, 45, 53, 21, 5, "output projection")
    _arrow(axes, (55.5, 48.5), (55.5, 53))
    _arrow(axes, (55.5, 58), (55.5, 61.5))


def _draw_experts_panel(axes: "Axes", words: dict[str, str]) -> None:
    _title(axes, 84, "Mixture of experts", f"{words['routed']}; {words['active']} work on a token")
    amber = {"face": AMBER, "edge": AMBER_EDGE}
    axes.text(104, 4.3, "normed hidden state", ha="center", color=MUTED)
    _box(axes, 86, 12, 20, 5, words["gate"], **amber)
    _box(axes, 86, 19.5, 20, 5.5, words["second"], **amber)
    _box(axes, 86, 27.5, 20, 5.5, words["third"], **amber)
    _box(axes, 109.5, 12, 17, 5, "balancing bias", face=ROSE, edge=ROSE_EDGE)
    axes.text(118, 10.4, "moves the choice only", ha="center", fontsize=7.6, color=MUTED)
    _arrow(axes, (104, 6), (104, 8.5), (96, 8.5), (96, 12))
    _arrow(axes, (96, 17), (96, 19.5))
    _arrow(axes, (96, 25), (96, 27.5))
    choice = 22.2 if words["second"] == words["choose"] else 30.2
    _arrow(axes, (118, 17), (118, choice), (106, choice), color=ROSE_EDGE)
    chosen = (1, 3)
    for i, label in enumerate(("1", "2", "3", "4", "...", "E")):
        x = 85 + 4.9 * i
        style = {"face": AMBER, "edge": AMBER_EDGE} if i in chosen else {}
        _box(axes, x, 41, 4, 6, label, **style)
        if i in chosen:
            _arrow(axes, (96, 33), (96, 36.5), (x + 2, 36.5), (x + 2, 41))
            _arrow(axes, (x + 2, 47), (x + 2, 51), (99, 51), (99, 54.2), color=AMBER_EDGE)
    axes.text(100.5, 51.6, "weighted sum", fontsize=7.6, color=MUTED, va="bottom")
    _box(axes, 117, 41, 11, 6, words["shared"], face=GREEN, edge=GREEN_EDGE)
    _arrow(axes, (104, 6), (104, 8.5), (128.6, 8.5), (128.6, 36.5), (122.5, 36.5), (122.5, 41), color=GREEN_EDGE)
    _arrow(axes, (122.5, 47), (122.5, 55.5), (100.3, 55.5), color=GREEN_EDGE)
    axes.text(124, 51, "always", fontsize=7.6, color=MUTED, va="center", ha="left")
    _plus(axes, 99, 55.5)
    _arrow(axes, (99, 56.8), (99, 61.5))
