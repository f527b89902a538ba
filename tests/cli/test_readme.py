"""Every code block of the README runs, in a folder where a debug-size demo has run.

Blocks run in the README's order in one process, because starting Python and importing torch costs seconds each time.
Python blocks share one namespace, as a reader would paste them. Shell lines go through the command's own entry point,
which ``test_main.py`` starts as a shell would. Lines that set a machine up (``make``) are left to the check of a fresh
clone.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|bash)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
RUN_BLOCKS = """
import json, sys
from deepseek_cli.main import main

namespace = {}
for kind, content in json.load(sys.stdin):
    if kind == "python":
        exec(compile(content, "<README>", "exec"), namespace)
        continue
    print("$", *content, flush=True)
    code = main(content[1:])
    if code:
        sys.exit(f"{' '.join(content)} ended with {code}")
"""
pytestmark = pytest.mark.xdist_group("demo")


def runnable_blocks() -> list[tuple[str, str | list[str]]]:
    """Python blocks as text, shell lines as words."""
    found = []
    for kind, code in BLOCKS:
        if kind == "python":
            found.append((kind, code))
            continue
        lines = [line for line in code.splitlines() if line.strip() and not line.startswith("make ")]
        found += [(kind, shlex.split(line, comments=True)) for line in lines]
    return found


def test_every_block_runs(demo_folder):
    blocks = runnable_blocks()
    commands = [content for kind, content in blocks if kind == "bash"]
    assert {words[0] for words in commands} == {"deepseek-moe"}
    done = subprocess.run(
        [sys.executable, "-c", RUN_BLOCKS],
        input=json.dumps(blocks),
        cwd=demo_folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    assert done.stdout.count("$ deepseek-moe ") == len(commands) > 8
    assert "True False" in done.stdout, "the sandbox's line"


def test_every_task_takes_five_lines():
    tasks = re.split(r"^### ", README, flags=re.MULTILINE)[1:]
    assert len(tasks) == 9
    for text in tasks:
        blocks = re.findall(r"^```(?:python|bash)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        assert blocks
        for block in blocks:
            lines = [line for line in block.splitlines() if line.strip() and not line.startswith(("import", "from"))]
            assert 1 <= len(lines) <= 5, block
