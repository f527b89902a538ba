"""Runs tests under other versions than the pinned ones, each set in an environment of its own.

    make test-versions                           every row of dev/versions.yaml
    make test-versions ONLY=transformers-5.24    one of them

Called by the Makefile. An environment is built once and again when its versions change. A deprecation that warns with
`FutureWarning` fails: what warns today breaks in a later release.
"""

import argparse
import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "dev" / "versions.yaml"
ENVIRONMENTS = ROOT / "build" / "versions"
# Two workers with one thread each, as `make test`.
_PYTEST = ["-m", "pytest", "-n", "2", "-p", "no:cacheprovider", "-W", "error::FutureWarning"]
# What PEFT 0.21.2 and TRL cause: its own defaults, and its GRPO while it generates.
_THEIRS = tuple(
    f"`{name}` is deprecated"
    for name in (
        "is_gradient_checkpointing",
        "gradient_checkpointing",
        "gradient_checkpointing_disable",
        "gradient_checkpointing_enable",
    )
)


def read_rows() -> dict[str, dict[str, Any]]:
    """Return the rows of `dev/versions.yaml` by name."""
    rows: dict[str, dict[str, Any]] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return rows


def write_pins(packages: dict[str, str]) -> str:
    """Return the text of constraints.txt with other versions of some packages.

    Args:
        packages: Version by package.
    """
    lines = []
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name = line.partition("==")[0]
        if name not in packages:
            lines.append(line)
    return "\n".join([*lines, *(f"{name}=={version}" for name, version in packages.items())]) + "\n"


def read_requirements() -> str:
    """Return what setup.cfg asks for, with the tests' extra."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    return settings["options"]["install_requires"] + settings["options.extras_require"]["test"]


def find_python(name: str) -> str | None:
    """Return the interpreter of that name, on the path or among pyenv's; None where none runs.

    Args:
        name: Such as ``python3.12``.
    """
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{name.removeprefix('python')}*/bin/python"))
    for candidate in [shutil.which(name), *map(str, pyenv)]:
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    return None


def build_environment(name: str, python: str, packages: dict[str, str]) -> Path:
    """Return the interpreter of a row's environment, built first where it is missing or holds other versions.

    Args:
        name: The row's.
        python: The interpreter it is built from.
        packages: Version by package, where it is not that of constraints.txt.
    """
    folder = ENVIRONMENTS / name
    pins, stamp = folder / "constraints.txt", folder / "installed"
    needs = write_pins(packages) + read_requirements()
    executable = folder / "bin" / "python"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == needs:
        return executable
    print(f"{name}: installing into {folder.relative_to(ROOT)}", flush=True)
    subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
    pins.write_text(write_pins(packages), encoding="utf-8")
    pip = [
        str(executable),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--constraint",
        str(pins),
    ]
    subprocess.run([*pip, "torch"], check=True)  # alone: with the rest, pip may take a build with CUDA libraries
    subprocess.run([*pip, "--editable", f"{ROOT}[test]"], check=True)
    stamp.write_text(needs, encoding="utf-8")
    return executable


def run_row(name: str, row: dict[str, Any], options: list[str]) -> str:
    """Return what came of a row, in one line that begins with passed, failed or skipped.

    Args:
        name: The row's.
        row: Its ``packages`` and ``tests``, and ``python`` where it is another one.
        options: What pytest gets besides.
    """
    python = find_python(row["python"]) if "python" in row else sys.executable
    if python is None:
        return f"skipped: no {row['python']} on this machine"
    try:
        executable = build_environment(name, python, {package: str(v) for package, v in row["packages"].items()})
    except subprocess.CalledProcessError as error:
        return f"failed: the environment could not be built ({' '.join(map(str, error.cmd[:6]))} ...)"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    ignored = [word for message in _THEIRS for word in ("-W", f"ignore:{message}:FutureWarning")]
    done = subprocess.run(
        [str(executable), *_PYTEST, *ignored, *options, *row["tests"]],
        cwd=ROOT,
        env={**os.environ, **offline, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    print(done.stdout, flush=True)
    closing = re.findall(r"^(?:=+ )?(\d+ (?:passed|failed|error|skipped).*?)(?: =+)?$", done.stdout, re.MULTILINE)
    counted = closing[-1] if closing else f"pytest ended with {done.returncode}"
    return f"{'failed' if done.returncode else 'passed'}: {counted}"


def main() -> int:
    """Run the rows and print one line each; 1 if one failed, 2 for an unknown name."""
    parser = argparse.ArgumentParser(description="Run tests under other versions than the pinned ones.")
    parser.add_argument("--only", metavar="NAME", help="one row of dev/versions.yaml")
    parser.add_argument("options", nargs="*", help="options of pytest, after --")
    args = parser.parse_args()
    rows = read_rows()
    if args.only is not None and args.only not in rows:
        print(f"only: got {args.only!r}, expected one of {', '.join(rows)}", file=sys.stderr)
        return 2
    names = list(rows) if args.only is None else [args.only]
    outcomes = {name: run_row(name, rows[name], args.options) for name in names}
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome}")
    return int(any(outcome.startswith("failed") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
