"""A stage killed under the rendered files ends as an undisturbed one: on this machine, and in a Slurm of one node."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepseek_cli.main import main
from deepseek_records.run_folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
WORDS = ["--cpu", "--processes-per-node", "2", "--max-steps", "40", "--save-steps", "5"]


def wait_for(what, seconds):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.2)


def processes_of(output: Path) -> list[int]:
    """The stage's own processes, by their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(output).encode() in words and b"torch.distributed.run" not in words and b"--dry-run" not in words:
            found.append(int(folder.name))
    return found


def write_job(tmp_path, name, *words):
    output, script = tmp_path / name, tmp_path / f"{name}.sh"
    settings = ["launch", "pretrain-debug", "--output", str(output), "--file", str(script), *WORDS, *words]
    assert main(settings) == 0
    return output, script


def figure(output):
    return RunFolder(output).read_summary().results[0].value


def kill_one(output):
    wait_for(lambda: (output / "checkpoints" / "checkpoint-10").is_dir(), 240)
    os.kill(max(processes_of(output)), signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output, script = write_job(tmp_path_factory.mktemp("whole"), "whole")
    subprocess.run(
        ["bash", script], check=True, capture_output=True, timeout=300, env=os.environ | {"MASTER_PORT": "29611"}
    )
    return figure(output)


def test_a_killed_process_is_started_again_here(tmp_path, undisturbed):
    output, script = write_job(tmp_path, "killed")
    with subprocess.Popen(["bash", script], stderr=subprocess.PIPE, env=os.environ | {"MASTER_PORT": "29612"}) as job:
        kill_one(output)
        _, error = job.communicate(timeout=300)
    assert job.returncode == 0 and b"attempt 1 of 11 is over" in error
    assert figure(output) == undisturbed


def test_a_port_in_use_is_told_before_the_first_attempt(tmp_path):
    output, script = write_job(tmp_path, "taken")
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        done = subprocess.run(
            ["bash", script],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"MASTER_PORT": port},
            check=False,
        )
    assert done.returncode == 2 and not output.exists()
    assert done.stderr.splitlines()[-1] == f"MASTER_PORT: got {port}, which another program uses, expected a free port"


def test_an_engine_that_is_not_installed_is_told_before_the_first_attempt(tmp_path):
    output, script = write_job(tmp_path, "zero3", "--engine", "zero3")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    find = [sys.executable, "-c", "import deepspeed"]
    if not subprocess.run(find, env=environment, capture_output=True, check=False).returncode:
        pytest.skip("DeepSpeed is installed")
    done = subprocess.run(["bash", script], capture_output=True, text=True, env=environment, check=False)
    told = "engine: got zero3 without DeepSpeed, expected it installed: pip install 'deepseek-moe[deepspeed]'\n"
    assert (done.returncode, done.stderr) == (2, told) and not output.exists()


SLURM_CONF = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/d.log
SlurmctldPort=16827
SlurmdPort=16828
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
FirstJobId={first}
MpiDefault=none
SchedulerParameters=sched_interval=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    if not all(map(shutil.which, ("slurmctld", "slurmd", "sbatch", "munged"))) or os.geteuid():
        pytest.skip("needs Debian's slurm-wlm and root")
    for name in ("state", "spool"):
        (tmp_path / name).mkdir()
    host = os.uname().nodename.split(".")[0]
    (tmp_path / "slurm.conf").write_text(
        SLURM_CONF.format(host=host, folder=tmp_path, first=1000 + os.getpid() % 50_000)
    )
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge")
    subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=False, capture_output=True)
    for daemon in ("slurmctld", "slurmd"):
        subprocess.run([daemon], check=True, capture_output=True)
    wait_for(lambda: b"idle" in subprocess.run(["sinfo", "-h"], capture_output=True, check=False).stdout, 60)
    yield tmp_path
    # A step that outlives its controller tells the next one that its job is over, whichever has that number then.
    try:
        wait_for(lambda: not subprocess.run(["squeue", "-h"], capture_output=True, check=False).stdout, 60)
    finally:
        for name in ("d.pid", "ctld.pid"):
            os.kill(int((tmp_path / name).read_text()), signal.SIGTERM)


def test_slurm_queues_a_killed_job_again(slurm, undisturbed, monkeypatch):
    output, script = write_job(slurm, "queued", "--on", "slurm", "--name", "moe")
    monkeypatch.chdir(slurm)
    subprocess.run(["sbatch", "--test-only", script], check=True, capture_output=True)
    subprocess.run(["sbatch", script], check=True, capture_output=True)
    kill_one(output)
    wait_for((output / "summary.json").is_file, 400)
    assert "queued again" in next(slurm.glob("moe-*.log")).read_text()
    assert figure(output) == undisturbed
