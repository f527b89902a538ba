"""The pages as a site: each is listed, the first hour names what exists, and the build gives no warning."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
FIRST_HOUR = (ROOT / "docs" / "first_hour.md").read_text(encoding="utf-8")
# `name()` is a function, `Name` (at least two capitals, or one and lower case) a class.
FUNCTION = re.compile(r"\b([a-z_]\w*)\(\)")
CLASS = re.compile(r"`([A-Z][a-z]\w*)`|<br/>([A-Z][a-z]+[A-Z]\w*)")


def test_index_and_navigation_list_every_page():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    linked = re.findall(r"^- \[[^]]+\]\((\w+\.md)\): \S", index, re.MULTILINE)
    assert sorted([*linked, "index.md"]) == PAGES
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    assert sorted(re.findall(r"\w+\.md", navigation)) == PAGES


def stops() -> list[tuple[str, str]]:
    """Title and text of each numbered section of the first hour, diagrams left out."""
    parts = re.split(r"^## (\d\..*)$", FIRST_HOUR, flags=re.MULTILINE)
    without = [re.sub(r"```mermaid.*?```", "", text, flags=re.DOTALL) for text in parts[2::2]]
    return list(zip(parts[1::2], without, strict=True))


def test_there_are_eight_stops_and_two_diagrams():
    assert [title[0] for title, _ in stops()] == list("12345678")
    assert FIRST_HOUR.count("```mermaid") == 2


@pytest.mark.parametrize(("title", "text"), stops(), ids=[title for title, _ in stops()])
def test_a_stop_names_what_its_files_define(title, text):
    files = [ROOT / path for path in re.findall(r"`([\w/]+\.py)`", text)]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    assert files and source
    others = {"Trainer"}  # transformers' own
    for name in FUNCTION.findall(text):
        assert re.search(rf"^(?:    )?def {name}\(", source, re.MULTILINE), name
    for name in {one or two for one, two in CLASS.findall(text)} - others:
        assert re.search(rf"^class {name}\b", source, re.MULTILINE), name


def test_the_diagrams_name_what_exists():
    files = [path for folder in ("kernels", "modeling_deepseek", "records", "model_cards", "training", "eval", "cli")
             for path in (ROOT / folder).rglob("*.py")]  # fmt: skip
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    defined = set(re.findall(r"^\s*(?:def|class) (\w+)", source, re.MULTILINE))
    diagrams = "".join(re.findall(r"```mermaid(.*?)```", FIRST_HOUR, re.DOTALL))
    # Words of two humps are names of classes.
    named = set(FUNCTION.findall(diagrams)) | set(re.findall(r"\b[A-Z][a-z]+(?:[A-Z][a-zA-Z]*)+\b", diagrams))
    assert len(named) > 15
    assert not named - defined - {"AdamW"}


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in PAGES:
        name = "index.html" if page == "index.md" else f"{page.removesuffix('.md')}/index.html"
        assert (tmp_path / "site" / name).is_file()
