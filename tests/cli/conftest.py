"""One debug-size demo, run once through the real command and shared by the tests that look at what it wrote."""

import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from run_deepseek_moe import run_command


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory, worker_id) -> Path:
    """A folder in which ``deepseek-moe demo --size debug`` wrote ``runs/demo``.

    Several pytest workers share one: the first to ask runs the demo, the others wait for it and take a copy.
    """
    if worker_id == "master":
        return _run_demo(tmp_path_factory.mktemp("demo"))
    shared = tmp_path_factory.getbasetemp().parent / "demo"
    with FileLock(f"{shared}.lock"):
        if not (shared / "stdout.txt").exists():
            shared.mkdir(exist_ok=True)
            _run_demo(shared)
    return Path(shutil.copytree(shared, tmp_path_factory.mktemp("demo") / "copy"))


def _run_demo(folder: Path) -> Path:
    done = run_command("demo", "--size", "debug", cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (folder / "stdout.txt").write_text(done.stdout)
    return folder
