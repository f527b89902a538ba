"""Runs the real command, as a user's shell would."""

import os
import subprocess
import sys
from pathlib import Path

COMMAND = Path(sys.executable).with_name("deepseek-moe")
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "COLUMNS": "100"}


def run_command(*arguments: str, cwd: Path, **options) -> subprocess.CompletedProcess:
    """Run ``deepseek-moe`` and return its code and output."""
    return subprocess.run(
        [str(COMMAND), *arguments], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False, **options
    )
