"""Every code block of the README runs, in a folder where a debug-size demo has run.

Python blocks share one namespace in the README's order, as a reader would paste them. Of the shell blocks, lines that
set up (git, cd, make) are left to the fresh-clone check; every `deepseek-moe` and `python` line runs as it stands.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [(kind, code) for kind, code in BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))]
# Lines that set a machine up; make demo and make test are run in a fresh clone.
SKIPPED = ("git ", "cd ", "make ", "pip ")
pytestmark = pytest.mark.xdist_group("demo")


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def test_python_blocks_run(demo_folder):
    code = "\n".join(code for kind, code in BLOCKS if kind == "python")
    assert code
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=demo_folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def shell_lines() -> list[str]:
    lines = []
    for kind, code in BLOCKS:
        if kind == "bash":
            lines += [line for line in code.replace("\\\n", " ").splitlines() if line.strip() and line[0] != "#"]
    return [line for line in lines if not line.startswith(SKIPPED)]


def test_shell_lines_run_in_order(demo_folder):
    # One test, for each line builds on those before it.
    assert shell_lines()
    for line in shell_lines():
        words = shlex.split(line, comments=True)
        done = subprocess.run(
            words, cwd=demo_folder, env=environment(), capture_output=True, text=True, check=False, timeout=280
        )
        assert done.returncode == 0, line + done.stdout[-1500:] + done.stderr[-1500:]
