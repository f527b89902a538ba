"""setup.cfg allows what was tested and no more: the pins of constraints.txt and the rows of dev/versions.yaml."""

import configparser
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from versions import read_rows, write_pins

ROOT = Path(__file__).resolve().parents[2]
# Those whose releases break us; the others are bounded by what these ask for.
HELD = ("peft", "torch", "transformers", "triton", "trl")


def requirements() -> dict[str, Requirement]:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = settings["options"]["install_requires"].strip().splitlines()
    return {one.name: one for one in map(Requirement, lines)}


def versions_tested() -> dict[str, set[Version]]:
    found: dict[str, set[Version]] = {}
    for packages in ({}, *(row["packages"] for row in read_rows().values())):
        for name, version in re.findall(r"^([\w.-]+)==([\w.]+)$", write_pins(packages), re.MULTILINE):
            found.setdefault(name, set()).add(Version(version))
    return found


@pytest.mark.parametrize("name", HELD)
def test_the_range_begins_and_ends_with_what_was_tested(name):
    versions, allowed = versions_tested()[name], requirements()[name].specifier
    assert all(version in allowed for version in versions)
    oldest, newest = min(versions), max(versions)
    assert Version(f"{oldest.major}.{oldest.minor - 1}.99") not in allowed
    assert Version(f"{newest.major}.{newest.minor + 1}.0") not in allowed


def test_every_row_names_tests_that_exist():
    for name, row in read_rows().items():
        paths = [path for path in row["tests"] if not path.startswith("-")]
        assert paths and all((ROOT / path).exists() for path in paths), name
        assert row["packages"], name
