"""One debug-size demo, run once through the real command and shared by the tests that look at what it wrote."""

from pathlib import Path

import pytest
from run_deepseek_moe import run_command


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory) -> Path:
    """A folder in which ``deepseek-moe demo --size debug`` wrote ``runs/demo``."""
    folder = tmp_path_factory.mktemp("demo")
    done = run_command("demo", "--size", "debug", cwd=folder)
    (folder / "stdout.txt").write_text(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder
