"""The report in a real browser, from a phone to a wide screen, light and dark: nothing hidden, nothing hard to read.

Needs a Chromium (`apt-get install chromium`); skipped where there is none. `measure_page.js` counts what is cut and
what has too little contrast.
"""

import shutil
from pathlib import Path

import pytest
from browser import find_browser, open_browser

from deepseek_model_cards.report.report import write_report
from deepseek_records.run_folder import RunFolder
from deepseek_records.summary import Check, DataUse, Published, Result, Sample, Summary

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed (apt-get install chromium)"),
]
MEASURE = (Path(__file__).parents[1] / "measure_page.js").read_text()
WIDTHS = (360, 768, 1280, 2560)
LONG = "a-very-long-name-without-a-place-to-break_" * 3


@pytest.fixture(scope="module")
def page():
    with open_browser() as page:
        yield page


@pytest.fixture(scope="module")
def report(finished_run, tmp_path_factory) -> Path:
    """The synthetic run's report with items to browse, and an evaluation with everything that widens a table."""
    root = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("browser") / "demo"))
    align = root / "align"
    with open(align / "metrics.jsonl", "a") as file:
        file.write(
            '{"step": 61, "loss/policy_avg": 0.1, "loss/value_avg": 0.2, "learning_rate": 0.1, "entropy": 1.0}\n'
        )
    shutil.rmtree(root / "evaluate")
    settings = {"model_name_or_path": str(align / "model"), "note": LONG}
    run = RunFolder.create(root / "evaluate", settings, command="evaluate", seed=1)
    published = (
        Published(by="DeepSeek-V3 base", value=0.871, remark="5-shot"),
        Published(by="the article", value=0.8),
    )
    options = {"split": "test", "num_fewshot": 5, "chance": 0.25, "is_share": True, "published": published}
    rows = [
        Result(metric="acc", dataset=name, task=name, value=0.26, stderr=0.04, n=114, **options)
        for name in ("m", LONG)
    ]
    (run.path / "samples_m.jsonl").write_text(
        "".join(
            f'{{"id": "m/{i}", "prediction": {i % 4}, "target": 1, "acc": {int(i % 4 == 1)}}}\n' for i in range(300)
        )
    )
    run.finish(
        Summary(
            stage="evaluate",
            results=tuple(rows),
            checks=(Check(name=LONG, value=1.0, passed=False), Check(name="b", value=1.0, passed=True)),
            data=(DataUse(name=LONG, license=LONG, source=LONG),),
            samples=(Sample(prompt=LONG, completion=LONG),),
        )
    )
    return write_report(root, root / "report.html", with_items=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_hidden_and_all_can_be_read(page, report, width, scheme):
    page.open(report, width, scheme)
    found = page.run(MEASURE)
    assert found["overflow"] == [] and found["contrast"] == []
    assert found["scrollY"] == 0 and found["wide"] <= 0  # it opens at its top
    assert found["tables"] == 3 and len(found["images"]) > 8 and all(found["images"])
    assert found["count"] > 200  # letters were looked at


def test_the_scheme_reaches_page_and_charts(page, report):
    sources = {}
    for scheme in ("light", "dark"):
        page.open(report, 1280, scheme)
        sources[scheme] = page.run("document.images[0].currentSrc")
        ink = page.run("getComputedStyle(document.body).backgroundColor")
        assert (ink == "rgb(245, 247, 250)") == (scheme == "light")
    assert sources["light"] != sources["dark"]


def test_a_link_to_an_item_opens_there_and_arrows_move_the_list_alone(page, report):
    page.open(report, 1280, "light")
    page.run("document.getElementById('items-list').focus({preventScroll: true})")
    press = "document.getElementById('items-list').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowDown'}))"
    page.run(f"for (let i = 0; i < 60; i++) {press}")
    assert page.run("document.querySelector('#items-list [aria-selected=true]').textContent") == "m/60"
    assert page.run("scrollY") == 0 and page.run("document.getElementById('items-list').scrollTop") > 0
    assert page.run("location.hash") == "#item/m/m%2F60"
    page.call("Page.navigate", url="about:blank")
    page.call("Page.navigate", url=report.resolve().as_uri() + "#item/m/m%2F60")
    page.run("new Promise(done => setTimeout(done, 600))")
    assert page.run("document.querySelector('#items-list [aria-selected=true]').textContent") == "m/60"
    assert page.run("scrollY") > 100


def test_the_measurement_notices_what_it_is_for(page, tmp_path):
    bad = tmp_path / "bad.html"
    cell = "<td style='white-space: nowrap'>a column of a table that has no room</td>"
    bad.write_text(
        f"<!DOCTYPE html><meta name='viewport' content='width=device-width'><body>"
        f"<div style='overflow-x: auto'><table><tr>{cell * 4}</tr></table></div>"
        "<p style='color: #aaa; background: #fff'>faint</p>"
    )
    page.open(bad, 360, "light")
    found = page.run(MEASURE)
    assert any(text.startswith("inside, div") for text in found["overflow"]) and "faint" in found["contrast"][0]
