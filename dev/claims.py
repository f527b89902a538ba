"""The register of measured figures, ``docs/claims.yaml``: check the pages against it, and measure again.

    python dev/claims.py check             # figures without a claim (prints what to paste), claims that no page shows
    python dev/claims.py check docs/x.md   # of one page
    python dev/claims.py list              # id, status, value, command
    python dev/claims.py run               # every claim that a command can measure here
    python dev/claims.py run --under 60    # those that take less than 60 s
    python dev/claims.py run --only ID     # one

What counts as a figure says ``figures_in_markdown.py``. ``docs/claims.yaml`` begins with its own description.
``tests/house/test_claims.py`` runs the check.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from figures_in_markdown import find_blocks, find_figures, find_tables, numbers_in

ROOT = Path(__file__).resolve().parents[1]
REGISTER = ROOT / "docs" / "claims.yaml"
STATUSES = ("measured", "superseded", "not reached")
REASONS = ("setting", "size", "formula", "published", "example")
TOLERANCES = ("exact", "relative", "absolute", "at least", "at most")


@dataclass(frozen=True)
class Place:
    """Where a page shows a figure.

    Args:
        page: Path of the page.
        text: A piece of its text that holds the figures, spaces and line ends counting as one space; or
        table: the beginning of a table's header row, or of any of its rows if no header has it; or
        block: the beginning of a line in a code block; or
        all: true, for every figure of the page.
        digest: Of a table's or block's figures, so that none changes unnoticed.
    """

    page: str
    text: str = ""
    table: str = ""
    block: str = ""
    all: bool = False
    digest: str = ""


@dataclass(frozen=True)
class Claim:
    """One measurement, or what belongs together of one.

    Args:
        id: Unique name.
        command: What measures it.
        machine: Key of ``machines``.
        date: When it was measured last.
        versions: Key of ``versions``.
        value: The figures; each stands in one of the places, those that a machine can read off first.
        tolerance: One of `TOLERANCES` with its number; ``exact`` with 0.
        status: One of `STATUSES`.
        shown: Places.
        goal: What was to be reached, where it was not.
        reads: Regular expression whose groups are the first values in the command's output; empty: read by a person.
        asserts: Whether the command is a test that fails outside of the tolerance, so that nothing is to be read.
        seconds: How long the command takes.
        needs: What the command needs beyond the package: a data set, another package, a GPU.
    """

    id: str
    command: str
    machine: str
    date: str
    versions: str
    value: tuple[float, ...]
    tolerance: tuple[str, float]
    status: str
    shown: tuple[Place, ...]
    goal: str = ""
    reads: str = ""
    asserts: bool = False
    seconds: float = math.inf
    needs: str = ""

    @property
    def can_run(self) -> bool:
        """Whether the command alone measures it."""
        return (bool(self.reads) or self.asserts) and not self.needs and self.status != "superseded"


@dataclass(frozen=True)
class Register:
    """The whole file.

    Args:
        claims: In the file's order.
        not_claims: Places whose figures nobody measured.
    """

    claims: tuple[Claim, ...]
    not_claims: tuple[Place, ...]


def pages() -> list[str]:
    """Return the pages whose figures are held: README, CHANGELOG and all of docs/."""
    return ["README.md", "CHANGELOG.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def load_register(path: Path = REGISTER) -> Register:
    """Read the register.

    Args:
        path: The YAML file.

    Raises:
        ValueError: An entry lacks a field, has an unknown one, or a value that is not allowed.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    claims = tuple(_read_claim(entry, content) for entry in content["claims"])
    ids = [claim.id for claim in claims]
    for name in ids:
        if ids.count(name) > 1:
            raise ValueError(f"claims: got the id {name} twice, expected it once")
    others = []
    for entry in content["not_claims"]:
        if entry.get("why") not in REASONS:
            raise ValueError(f"not_claims: got why: {entry.get('why')} in {entry}, expected one of {REASONS}")
        others.append(Place(**{key: value for key, value in entry.items() if key != "why"}))
    return Register(claims, tuple(others))


def _read_claim(entry: dict[str, Any], content: dict[str, Any]) -> Claim:
    name = entry.get("id", entry)
    try:
        value = entry["value"] if isinstance(entry["value"], list) else [entry["value"]]
        tolerance = entry["tolerance"] if isinstance(entry["tolerance"], dict) else {entry["tolerance"]: 0}
        ((kind, allowed),) = tolerance.items()
        claim = Claim(
            **{
                **entry,
                "value": tuple(float(number) for number in value),
                "date": str(entry["date"]),
                "tolerance": (kind, float(allowed)),
                "shown": tuple(Place(**place) for place in entry["shown"]),
            }
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"claim {name}: got {error!r}, expected the fields that docs/claims.yaml describes") from None
    for what, got, allowed_values in (
        ("status", claim.status, STATUSES),
        ("tolerance", kind, TOLERANCES),
        ("machine", claim.machine, tuple(content["machines"])),
        ("versions", claim.versions, tuple(content["versions"])),
    ):
        if got not in allowed_values:
            raise ValueError(f"claim {name}: got {what} {got}, expected one of {', '.join(allowed_values)}")
    if (claim.status == "not reached") != bool(claim.goal):
        raise ValueError(
            f"claim {name}: got status {claim.status}, goal {claim.goal!r}, expected a goal if not reached"
        )
    return claim


def check_page(page: str, register: Register) -> list[str]:
    """Return what does not agree between a page and the register, one message each.

    Args:
        page: Path of the page.
        register: The register.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    complaints, covered = [], []
    places = [(claim.id, place) for claim in register.claims for place in claim.shown]
    places += [("not_claims", place) for place in register.not_claims]
    for name, place in places:
        if place.page != page:
            continue
        spans = find_place(text, place)
        covered += spans
        if not spans:
            sought = place.text or place.table or place.block
            complaints.append(f"{page}: no longer shows {sought!r} of {name}; change or remove the entry")
        elif (place.table or place.block) and name != "not_claims" and digest_of(text, spans) != place.digest:
            complaints.append(
                f"{page}: the figures of {(place.table or place.block)!r} ({name}) changed; if they were measured "
                f"again, put date and value right and set digest: {digest_of(text, spans)}"
            )
    loose = [
        figure
        for figure in find_figures(text)
        if not any(start <= figure.start and figure.end <= end for start, end in covered)
    ]
    return complaints + [_stub(page, text, group) for group in _by_passage(text, [f.start for f in loose])]


def check_values(register: Register) -> list[str]:
    """Return which claims register a value that no place shows, or show in a text a figure not among their values.

    Tables and blocks hold more figures than a claim lists; their digest holds the rest.

    Args:
        register: The register.
    """
    complaints = []
    for claim in register.claims:
        numbers: list[float] = []
        for place in claim.shown:
            text = (ROOT / place.page).read_text(encoding="utf-8")
            for start, end in find_place(text, place):
                numbers += numbers_in(text[start:end])
                figures = [f for f in find_figures(text) if place.text and start <= f.start and f.end <= end]
                strange = [f.text for f in figures if not all(n in claim.value for n in numbers_in(f.text))]
                if strange:
                    complaints.append(f"{claim.id}: {place.page} shows {strange}, which are not among its values")
        absent = [value for value in claim.value if value not in numbers]
        if absent:
            complaints.append(f"{claim.id}: registers {absent}, which none of its places shows")
    return complaints


def find_place(text: str, place: Place) -> list[tuple[int, int]]:
    """Return the stretches of a page that a place covers; none where the page no longer has it.

    Args:
        text: The page's Markdown.
        place: The place.
    """
    if place.all:
        return [(0, len(text))]
    if place.text:
        pattern = r"\s+".join(re.escape(word) for word in place.text.split())
        return [match.span() for match in re.finditer(pattern, text)]
    regions = find_tables(text) if place.table else find_blocks(text)
    sought = " ".join((place.table or place.block).split())
    found = [region for region in regions if region.first_line.startswith(sought)]
    if not found:
        found = [
            region
            for region in regions
            if any(" ".join(line.split()).startswith(sought) for line in text[region.start : region.end].split("\n"))
        ]
    return [(region.start, region.end) for region in found]


def digest_of(text: str, spans: list[tuple[int, int]]) -> str:
    """Return eight characters that change when a figure within the stretches does.

    Args:
        text: The page's Markdown.
        spans: The stretches.
    """
    numbers = " ".join(str(number) for start, end in spans for number in numbers_in(text[start:end]))
    return hashlib.sha256(numbers.encode()).hexdigest()[:8]


def _by_passage(text: str, offsets: list[int]) -> list[tuple[int, int]]:
    """The tables, blocks and sentences in which figures stand, each once."""
    passages = []
    regions = [(region.start, region.end) for region in find_tables(text) + find_blocks(text)]
    for offset in offsets:
        inside = [span for span in regions if span[0] <= offset < span[1]]
        if inside:
            passages.append(inside[0])
            continue
        before = [match.end() for match in re.finditer(r"[.:;] |\n\n|\n- |[.:;]\n", text[:offset])]
        after = re.search(r"[.;:](?=\s)|\n\n|\n- ", text[offset:])
        passages.append((before[-1] if before else 0, offset + after.start() if after else len(text)))
    return sorted(set(passages))


def _stub(page: str, text: str, passage: tuple[int, int]) -> str:
    """What to paste into the register for figures that are not in it."""
    start, end = passage
    region = [region for region in find_tables(text) + find_blocks(text) if (region.start, region.end) == passage]
    shown = " ".join(text[start:end].split())
    inside = [figure.text for figure in find_figures(text) if start <= figure.start and figure.end <= end]
    values = ", ".join(f"{number:g}" for number in dict.fromkeys(numbers_in(" ".join(inside))))
    values = values if not region else "FILL IN THE MAIN ONES"
    place = f"text: {json.dumps(shown, ensure_ascii=False)}"
    if region:
        kind = "table" if text[start:].lstrip().startswith("|") else "block"
        first = json.dumps(region[0].first_line[:60], ensure_ascii=False)
        place = f"{kind}: {first}, digest: {digest_of(text, [passage])}"
    line = text[:start].count("\n") + 1
    return f"""{page}:{line}: not in docs/claims.yaml. Paste under claims (or under not_claims, with why):
- id: FILL-IN
  command: FILL IN
  machine: epyc-1
  date: {time.strftime("%Y-%m-%d")}
  versions: "2026-11"
  value: [{values}]
  tolerance: {{relative: 0.05}}
  status: measured
  shown:
  - {{page: {page}, {place}}}"""


def run_claim(claim: Claim) -> tuple[bool, str]:
    """Measure a claim again; return whether it holds, and one line about it.

    Args:
        claim: One that can run.
    """
    code, output, seconds = _run_command(claim.command)
    match = re.search(claim.reads, output, re.DOTALL | re.MULTILINE)
    if code != 0 or match is None:
        last = output.strip().splitlines()[-1:] or ["no output"]
        return False, f"{claim.id}: {shlex.quote(claim.command)} ended with {code}: {last[0][:200]}"
    if claim.asserts:
        return True, f"{claim.id}: holds: asserted by the test, {list(claim.value)} {claim.tolerance}, {seconds:.0f} s"
    got = [numbers_in(group)[0] for group in match.groups()]
    holds = all(_agrees(new, old, claim.tolerance) for new, old in zip(got, claim.value, strict=False))
    word = "holds" if holds else "DIFFERS"
    return holds, f"{claim.id}: {word}: got {got}, registered {list(claim.value)} {claim.tolerance}, {seconds:.0f} s"


@functools.cache
def _run_command(command: str) -> tuple[int, str, float]:
    """Exit code, output and seconds; several claims may read one output."""
    started = time.monotonic()
    # The interpreter's own folder comes first: `pytest` and `deepseek-moe` are those of this environment.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run(
        command,
        shell=True,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        executable="/bin/bash",
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - started


def _agrees(new: float, old: float, tolerance: tuple[str, float]) -> bool:
    kind, allowed = tolerance
    if kind == "at least":
        return new >= allowed
    if kind == "at most":
        return new <= allowed
    return abs(new - old) <= (allowed * abs(old) if kind == "relative" else allowed)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 0 if all agrees.

    Args:
        arguments: Of the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("check", "list", "run"))
    parser.add_argument("page", nargs="*", help="pages to check; all by default")
    parser.add_argument("--only", default="", metavar="ID", help="run this claim")
    parser.add_argument(
        "--under", type=float, default=math.inf, metavar="S", help="run what takes less than S seconds"
    )
    args = parser.parse_args(arguments)
    register = load_register()
    if args.action == "check":
        complaints = [line for page in args.page or pages() for line in check_page(page, register)]
        complaints += check_values(register)
        print("\n\n".join(complaints) or f"{len(register.claims)} claims, all shown; no other figure")
        return bool(complaints)
    if args.action == "list":
        for claim in register.claims:
            print(f"{claim.id:40} {claim.status:12} {list(claim.value)!s:30} {claim.command}")
        return 0
    chosen = [claim for claim in register.claims if claim.can_run and claim.seconds < args.under]
    if args.only:
        chosen = [claim for claim in register.claims if claim.id == args.only]
        if not chosen or not chosen[0].can_run:
            known = ", ".join(claim.id for claim in register.claims if claim.can_run)
            raise SystemExit(f"--only: got {args.only}, expected one of {known}")
    outcomes = [run_claim(claim) for claim in chosen]
    print("\n".join(line for _, line in outcomes))
    return not all(holds for holds, _ in outcomes)


if __name__ == "__main__":
    sys.exit(main())
