import xml.etree.ElementTree as ET

import pytest

from deepseek_model_cards.card.block_picture import describe_block, draw_block
from modeling_deepseek import DeepseekConfig


def test_the_captions_are_the_configurations_numbers():
    config = DeepseekConfig.from_preset("154b").to_dict()
    words = describe_block(config)
    assert words["active"] == "8 to 12" and "128 routed experts" in words["routed"]
    assert words["cached"] == f"cached: {config['kv_lora_rank'] + config['qk_rope_head_dim']} numbers a token"
    assert (words["second"], words["third"]) == ("keep 8 to 12\nby cumulative share", "softmax over the chosen")


def test_a_plain_deepseek_v3_configuration_reads_as_v3():
    from transformers import DeepseekV3Config

    words = describe_block(DeepseekV3Config().to_dict())
    assert (words["second"], words["third"]) == ("sigmoid scores", "keep the top 8")
    assert words["norm"] == "RMSNorm" and words["gate"] == "linear gate"


@pytest.mark.parametrize("preset", ["154b", "debug"])
def test_the_picture_is_the_same_file_each_time(preset, tmp_path):
    """Committed pictures must not change without a reason, so no date and no random ids may be in them."""
    config = DeepseekConfig.from_preset(preset).to_dict()
    first = draw_block(config, tmp_path / "a.svg").read_bytes()
    assert first == draw_block(config, tmp_path / "b.svg").read_bytes()
    assert ET.fromstring(first).tag.endswith("svg")


def test_no_caption_leaves_its_box(tmp_path):
    """Measured on the rendered figure: each caption inside a box must be narrower than the box."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from deepseek_model_cards.card import block_picture

    figure = Figure(figsize=(13, 7.2))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 130), ylim=(0, 72))
    overrides = {"router_key_dim": 128, "norm_type": "layernorm"}
    words = describe_block(DeepseekConfig.from_preset("154b", **overrides).to_dict())
    for draw in (
        block_picture._draw_residual_panel,
        block_picture._draw_attention_panel,
        block_picture._draw_experts_panel,
    ):
        draw(axes, words)
    renderer = figure.canvas.get_renderer()
    boxes = [patch.get_window_extent(renderer) for patch in axes.patches]
    for text in axes.texts:
        extent = text.get_window_extent(renderer)
        middle = ((extent.x0 + extent.x1) / 2, (extent.y0 + extent.y1) / 2)
        for box in (box for box in boxes if box.contains(*middle)):
            assert box.x0 <= extent.x0 and extent.x1 <= box.x1, text.get_text()


def test_the_pictures_in_the_docs_are_of_the_shipped_preset(tmp_path):
    from pathlib import Path

    drawn = draw_block(DeepseekConfig.from_preset("154b").to_dict(), tmp_path / "block.svg").read_text()
    committed = (Path(__file__).parents[3] / "docs" / "images" / "block.svg").read_text()
    # The layout may differ by the installed matplotlib, the number of shapes may not.
    assert committed.count("<path") == drawn.count("<path") and committed.count("<use") == drawn.count("<use")
