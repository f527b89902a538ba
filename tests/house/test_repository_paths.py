"""Every file or folder of the repository that a Markdown page names exists, and so does every page it links to."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(path for folder in ("docs", "eval", "training", ".github") for path in sorted((ROOT / folder).rglob("*.md"))),
]
FOLDERS = "kernels|modeling_deepseek|records|model_cards|training|eval|serving|cli|dev|docs|tests|\\.github|\\.ci"
# `kernels/gpu/tune.py`, `tests/eval/reference`, `tests/training/test_x.py::test_y`; with `*` it is a pattern.
NAMED = re.compile(rf"(?<![\w./<>-])((?:{FOLDERS})/[\w./*{{}},-]*[\w*/}}])")
BARE = re.compile(r"`(\w+\.(?:py|sh|yaml|yml|cfg|toml))`")
TEST = re.compile(r"(?<![\w/])(test_\w+)(?![\w/.*])")
# Tests of transformers' own common suite, which run on our model too.
FROM_TRANSFORMERS = {"test_torch_compile_for_training", "test_can_init_all_missing_weights"}
WRITTEN_BY_A_RUN = {"recipe.yaml"}
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def named_paths(text: str) -> list[str]:
    """Paths of ours in a page; addresses and a run's own files are not looked at."""
    return NAMED.findall(re.sub(r"https?://\S+", "", text))


def exists(path: str) -> bool:
    if "{" in path:
        return True  # A pattern of shell braces, such as setup.cfg's own lists.
    return bool(list(ROOT.glob(path))) if "*" in path else (ROOT / path).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_paths_exist(page):
    missing = [path for path in named_paths(page.read_text(encoding="utf-8")) if not exists(path)]
    assert not missing


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True)
    return [ROOT / line for line in listed.stdout.splitlines()]


def test_files_named_without_a_folder_exist(tracked):
    names = {path.name for path in tracked}
    missing = {}
    for page in PAGES:
        gone = [name for name in BARE.findall(page.read_text(encoding="utf-8")) if name not in names]
        if set(gone) - WRITTEN_BY_A_RUN:
            missing[page.name] = gone
    assert not missing


# Files of other projects.
FOREIGN = {"classify_completions_strmatch.py", "modeling_deepseek_v3.py", "setup.py"}


def test_files_named_in_code_exist(tracked):
    """A docstring or comment that names ``x.py`` or `folder/x.py` names a file that is still there."""
    names = {path.name for path in tracked} | FOREIGN
    missing = {}
    for path in tracked:
        if path.suffix == ".py" and path != Path(__file__):
            found = re.findall(r"`+(?:[\w*]+/)*(\w+\.py)`", path.read_text(encoding="utf-8"))
            gone = set(found) - names
            if gone:
                missing[str(path.relative_to(ROOT))] = sorted(gone)
    assert not missing


def test_tests_named_on_pages_exist(tracked):
    sources = "".join(
        path.read_text(encoding="utf-8")
        for path in tracked
        if path.suffix == ".py" and path.is_relative_to(ROOT / "tests")
    )
    defined = set(re.findall(r"def (test_\w+)", sources))
    missing = {}
    for page in PAGES:
        gone = [
            name for name in TEST.findall(page.read_text(encoding="utf-8")) if name not in defined | FROM_TRANSFORMERS
        ]
        if gone:
            missing[page.name] = gone
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]


def test_a_missing_path_is_noticed():
    named = named_paths("see `kernels/no_such.py`, tests/house/test_claims.py, (docs/*.md) and https://a.b/docs/x.md")
    assert named == ["kernels/no_such.py", "tests/house/test_claims.py", "docs/*.md"]
    assert not exists("kernels/no_such.py") and exists("docs/*.md") and not exists("docs/no_such_*.md")
