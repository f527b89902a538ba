import base64
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from deepseek_model_cards.report import charts
from deepseek_model_cards.report.report import write_report


class Page(HTMLParser):
    """Collects what a browser would fetch and checks that tags close in order."""

    VOID = ("meta", "img", "br", "link", "input")

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
    pieces = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', html)
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
        ("mean_experts_per_tok", "Experts a token"),
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


def test_generations_are_text_not_markup(html):
    assert "there was a fox &amp; a &lt;crow&gt;." in html and "<crow>" not in html


def test_what_was_written_before_and_after_stands_under_one_prompt(html):
    assert html.count("How are you?") == 1
    assert re.search(r">before</span> the the the.*>after</span> I am well, thank you\.", html, re.DOTALL)


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
    text = " ".join(ET.fromstring(base64.b64decode(source.partition(",")[2])).itertext())
    assert "0.00" in text and "2.00" in text and "nan" not in text


def test_no_local_path_is_in_the_report(html, finished_run):
    assert "/home/someone" not in html and str(finished_run.parent) not in html
