"""The card of a model that was trained on cleaned text: its sources, licenses and counts, and the data's own card."""

import re
import shutil

import pytest

from deepseek_model_cards.card.card import write_card
from deepseek_records.cleaned_data import describe_cleaning
from deepseek_records.run_folder import RunFolder
from deepseek_records.summary import DataUse, Summary

USES = (
    DataUse(name="notes|a", split="train", license="CC BY 4.0", source="https://example.org/a", num_rows=1234,
            num_bytes=5_600_000, languages=("en",)),
    DataUse(name="notes|a", split="validation", license="CC BY 4.0", source="https://example.org/a", num_rows=56,
            num_bytes=78_000, languages=("en",)),
    DataUse(name="letters", split="train", license="MIT", source="https://example.org/b", num_rows=789,
            num_bytes=900, languages=("en", "zh")),
)  # fmt: skip
FILTERS = [
    {"name": "language", "num_in": 2200, "num_dropped": 21, "changes": {}},
    {"name": "exact duplicates", "num_in": 2179, "num_dropped": 100, "changes": {}},
]


@pytest.fixture
def runs(tmp_path, builders):
    cleaned = RunFolder.create(tmp_path / "clean", {}, command="data", seed=0)
    (cleaned.path / "README.md").write_text("# Data\n")
    cleaned.finish(Summary(stage="data", data=USES, details={"filters": FILTERS, "files": {}}))
    about = {"license": "CC BY 4.0; MIT", "source": "https://example.org/a", "cleaning": describe_cleaning(cleaned)}
    data = [
        DataUse(name="data", split="train", num_rows=2023, num_bytes=5_600_900, **about),
        DataUse(name="data", split="validation", used_for="evaluation", num_rows=20, num_bytes=30_000, **about),
    ]
    builders["stage"](tmp_path, "pretrain", settings={"data": "data"}, summary={"data": data})
    return tmp_path


def test_sources_licenses_counts_and_the_link(runs):
    text = write_card(runs / "pretrain").read_text()
    link = re.search(r"data \(pretrain\): cleaned by `deepseek-moe data`; .* \[data card\]\(([^)]+)\)", text)[1]
    assert (runs / "pretrain" / link).resolve() == runs / "clean" / "README.md"
    assert r"| notes\|a | train | 1,234 | 5.6 MB | en | CC BY 4.0 | https://example.org/a |" in text
    assert r"| notes\|a | validation | 56 | 78.0 kB | en | CC BY 4.0 | https://example.org/a |" in text
    assert "| letters | train | 789 | 900 B | en, zh | MIT | https://example.org/b |" in text
    assert "| exact duplicates | 2,179 | 100 | 2,079 |" in text
    assert text.count("cleaned by `deepseek-moe data`") == 1  # one cleaning, used twice
    assert str(runs) not in text


def test_without_the_data_the_figures_stay_and_the_link_goes(runs):
    shutil.rmtree(runs / "clean")
    text = write_card(runs / "pretrain").read_text()
    assert "[data card]" not in text and "in the run folder `clean`, whose data card does not lie beside" in text
    assert "| letters | train | 789 |" in text and str(runs) not in text


def test_a_card_elsewhere_tells_no_paths(runs, tmp_path_factory):
    text = write_card(runs / "pretrain", output=tmp_path_factory.mktemp("far") / "away" / "card").read_text()
    assert "[data card]" not in text and "| letters | train | 789 |" in text and str(runs) not in text


def test_a_card_for_the_hub_links_nothing_of_this_machine(runs):
    text = write_card(runs / "pretrain", repo_id="someone/model").read_text()
    assert "clean/README.md" not in text and "| letters | train | 789 |" in text


def test_other_text_has_no_such_section(demo_run):
    assert "cleaned by" not in write_card(demo_run).read_text()
