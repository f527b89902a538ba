import base64
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from deepseek_model_cards.report import charts
from deepseek_model_cards.report.report import write_report


class Page(HTMLParser):
    """Collects what a browser would fetch and checks that tags close in order."""

    VOID = ("meta", "img", "br", "link", "input", "source")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.sources = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def html(finished_run, tmp_path_factory):
    return write_report(finished_run, tmp_path_factory.mktemp("report") / "report.html").read_text()


def drawings(html: str) -> list[ET.Element]:
    pieces = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]+)"', html)
    return [ET.fromstring(base64.b64decode(piece)) for piece in pieces]


def test_the_page_is_well_formed_and_fetches_nothing(html):
    page = Page(html)
    assert page.open == [] and "script" not in page.tags and "link" not in page.tags
    assert page.sources and all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert "@import" not in html and "url(" not in html
    for drawing in drawings(html):
        links = [value for node in drawing.iter() for name, value in node.attrib.items() if name.endswith("href")]
        assert all(link.startswith(("#", "data:")) for link in links)


def test_every_part_is_drawn(html):
    words = [" ".join(drawing.itertext()) for drawing in drawings(html)]
    for expected in ("training loss", "medicine", "relevance", "KL to the reference", "load / even share", "chance"):
        assert any(expected in text for text in words), expected
    assert 'class="missing"' not in html


def test_the_load_of_an_expert_is_relative_to_an_even_share(html):
    words = " ".join(" ".join(drawing.itertext()) for drawing in drawings(html))
    # 110, 90, 130 and 70 tokens of 400 over 4 experts
    assert all(share in words for share in ("1.10", "0.90", "1.30", "0.70"))


@pytest.mark.parametrize(
    ("key", "title"),
    [
        ("load_imbalance", "Imbalance"),
        ("router_entropy", "Router entropy"),
        ("mean_experts_per_tok", "Experts per token"),
    ],
)
def test_what_a_stage_logs_of_its_router_is_drawn(tmp_path, builders, key, title):
    run = builders["pretrain"](tmp_path)
    plain = write_report(tmp_path, tmp_path / "report.html").read_text()
    assert not any(title in drawing.itertext() for drawing in drawings(plain))
    for step, value in ((10, 1.25), (20, 1.5), (30, 1.875)):
        run.log({"step": step, key: value, f"{key}_layer_0": 99.0})
    html = write_report(tmp_path, tmp_path / "report.html").read_text()
    found = [drawing for drawing in drawings(html) if title in drawing.itertext()]
    assert len(found) == 1 and "pretrain" in found[0].itertext() and f"{title} over steps" in html
    points = [path.get("d") for path in found[0].iter("{http://www.w3.org/2000/svg}path")]
    heights = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", next(d for d in points if d.count("L") == 2))]
    assert (heights[0] - heights[1]) / (heights[0] - heights[2]) == pytest.approx(0.25 / 0.625, rel=1e-3)


PPO = {
    **{"loss/policy_avg": "policy", "loss/value_avg": "value", "policy/clipfrac_avg": "Clip fraction"},
    **{"policy/entropy_avg": "Entropy", "length_tokens": "Length", "has_eos": "Completions that end"},
    **{"val/ratio": "Ratio", "learning_rate": "Learning rate", "grad_norm": "Gradient norm"},
}


def test_the_course_of_ppo_shows_what_was_logged_and_nothing_else(tmp_path, builders):
    run = builders["align"](tmp_path / "run")
    for step in (1, 2, 3):
        run.log({"step": step, **{key: step / 10 for key in PPO}})
    html = write_report(run.path, tmp_path / "report.html").read_text()
    words = [" ".join(drawing.itertext()) for drawing in drawings(html)]
    for key, text in PPO.items():
        assert any(text in found for found in words), key
    assert "Course of the alignment" in html
    other = builders["pretrain"](tmp_path / "other")
    assert "Course of the alignment" not in write_report(other.path, tmp_path / "other.html").read_text()


def test_what_was_written_under_one_prompt_stands_together_over_the_stages(tmp_path, builders):
    from deepseek_records.summary import Sample

    for name, text in (("pretrain", "words words"), ("sft", "an answer")):
        summary = {"samples": [Sample(prompt="Who?", completion=text)]}
        builders["stage"](tmp_path / "run", name, settings={"model": "x"}, summary=summary)
    html = write_report(tmp_path / "run", tmp_path / "report.html").read_text()
    assert html.count("Who?") == 1 and re.search(
        r"after pretrain</span>words.*after sft</span>an answer", html, re.DOTALL
    )


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("panel", "is_dark"), [("#ffffff", False), ("#1b2229", True)])
def test_charts_can_be_read_on_a_light_and_on_a_dark_page(html, panel, is_dark):
    assert f"--panel: {panel}" in html  # what the charts lie on
    for color in (charts.INK, charts.MUTED):
        assert contrast(charts.DARK[color] if is_dark else color, panel) >= 4.5
    for color in charts.SERIES:
        assert contrast(charts.DARK[color] if is_dark else color, panel) >= 3 - 0.3 * (not is_dark)
    pieces = re.findall(r'srcset="data:image/svg\+xml;base64,([^"]+)"', html)
    assert len(pieces) == len(drawings(html))
    assert not any(charts.INK in base64.b64decode(piece).decode() for piece in pieces)


def test_generations_are_text_not_markup(html):
    assert "there was a fox &amp; a &lt;crow&gt;." in html and "<crow>" not in html


def test_what_was_written_before_and_after_stands_under_one_prompt(html):
    assert html.count("How are you?") == 1
    assert re.search(r">before align</span> the the the.*>after align</span> I am well, thank you\.", html, re.DOTALL)


@pytest.mark.parametrize(
    ("built", "absent"), [(["pretrain"], ["adapt", "align", "evaluate"]), (["align"], ["pretrain", "evaluate"])]
)
def test_a_missing_stage_is_named(tmp_path, builders, built, absent):
    for name in built:
        builders[name](tmp_path)
    html = write_report(tmp_path, tmp_path / "report.html").read_text()
    for name in absent:
        assert f"This run has no {name} stage." in html


def test_an_unfinished_stage_is_named(tmp_path, builders):
    builders["pretrain"](tmp_path)
    builders["stage"](tmp_path, "align", settings={}, summary=None)
    html = write_report(tmp_path, tmp_path / "report.html").read_text()
    assert "The align stage was begun and not finished" in html


def test_a_missed_bar_is_shown_as_missed(html):
    assert '<span class="no">no</span>' in html and "2 of 3" in html


def test_an_expert_that_is_never_chosen_draws_as_zero():
    source = charts.heatmap([[0, 10, 20], [0, 0, 0]], ["MoE layer 1", "MoE layer 2"])
    text = " ".join(ET.fromstring(base64.b64decode(source["light"].partition(",")[2])).itertext())
    assert "0.00" in text and "2.00" in text and "nan" not in text


def test_no_local_path_is_in_the_report(html, finished_run):
    assert "/home/someone" not in html and str(finished_run.parent) not in html
