"""One debug-size demo, run once through the real command and shared by the tests that look at what it wrote."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).with_name("deepseek-moe")
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "COLUMNS": "100"}


def run_command(*arguments: str, cwd: Path, **options) -> subprocess.CompletedProcess:
    """Run ``deepseek-moe`` and return its code and output."""
    return subprocess.run(
        [str(COMMAND), *arguments], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False, **options
    )


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory) -> Path:
    """A folder in which ``deepseek-moe demo --size debug`` wrote ``runs/demo``."""
    folder = tmp_path_factory.mktemp("demo")
    done = run_command("demo", "--size", "debug", cwd=folder)
    (folder / "stdout.txt").write_text(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder
