"""An evaluation stopped by Ctrl-C and by SIGKILL goes on where it was and ends with the same files, to the byte."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REFERENCE = Path(__file__).resolve().parent / "reference"
COMMAND = [sys.executable, "-m", "deepseek_cli.main", "evaluate", str(REFERENCE / "ours"), "--tasks", "mmlu,humaneval"]
COMMAND += ["--limit", "mmlu=6,humaneval=12", "--num-samples", "2", "--temperature", "0.8", "--max-new-tokens", "24"]
COMMAND += ["--batch-size", "4", "--dtype", "float32", "--output"]


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def stop_after(output: Path, name: str, num_rows: int, number: signal.Signals) -> int:
    """Start the command, send the signal once a file has so many rows, and return the exit code."""
    process = subprocess.Popen([*COMMAND, str(output)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and count_lines(output / name) < num_rows:
            time.sleep(0.01)
        process.send_signal(number)
        return process.wait(timeout=120)
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_four_times_ends_as_one_that_was_not(tmp_path):
    stops = [
        ("samples_mmlu.partial.jsonl", 20, signal.SIGINT, 130),
        ("samples_mmlu.partial.jsonl", 150, signal.SIGKILL, -signal.SIGKILL),
        ("samples_humaneval.partial.jsonl", 4, signal.SIGKILL, -signal.SIGKILL),
        ("samples_humaneval.partial.jsonl", 12, signal.SIGINT, 130),
    ]
    seen = []
    for name, num_rows, number, code in stops:
        assert stop_after(tmp_path / "stopped", name, num_rows, number) == code
        seen.append(count_lines(tmp_path / "stopped" / name))
        assert not (tmp_path / "stopped/summary.json").exists()
    # Each was stopped on the way, with answers kept and answers missing.
    assert 20 <= seen[0] < 342 and seen[0] < seen[1] < 342 and 4 <= seen[2] < 24 and seen[2] < seen[3] < 24
    for folder in ("stopped", "whole"):
        subprocess.run([*COMMAND, str(tmp_path / folder)], check=True, capture_output=True)
    for name in ("samples_mmlu.jsonl", "samples_humaneval.jsonl"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    results = [json.loads((tmp_path / folder / "results.json").read_text()) for folder in ("stopped", "whole")]
    for result in results:
        result["tasks"]["humaneval"]["sandbox"].pop("user", None)  # Each process' programs have a user of their own.
    assert results[0] == results[1]
    assert not list((tmp_path / "stopped").glob("*.partial*"))
