"""Ctrl-C and SIGTERM at chosen moments of every stage: the last whole step is saved, and the same command goes on."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from deepseek_cli.main import main
from deepseek_records import stop_signals
from deepseek_records.run_folder import RunFolder
from deepseek_training.data.corpus import Corpus
from deepseek_training.data.packing import PackedDataset
from deepseek_training.ppo import trainer as ppo_trainer
from deepseek_training.ppo.player import Player
from deepseek_training.trainer import outcome
from deepseek_training.trainer.answers import HeldOutAnswers
from deepseek_training.trainer.checkpoints import last_complete_checkpoint, step_of
from deepseek_training.trainer.held_out import HeldOut
from deepseek_training.trainer.stage_trainer import StageTrainer

NUMBERS = {signal.SIGINT: 130, signal.SIGTERM: 143}


def send_in(monkeypatch, owner, name, call, number):
    """Send the signal to this process in the middle of the n-th call of a function."""
    original, calls = getattr(owner, name), [0]
    kind = vars(owner).get(name) if isinstance(owner, type) else None
    function = original.__func__ if isinstance(kind, classmethod) else original

    def stopped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, classmethod(stopped) if isinstance(kind, classmethod) else stopped)
    return calls


def check_stopped(capsys, code, number, run, step):
    errors = capsys.readouterr().err
    assert code == NUMBERS[number]
    assert "Traceback" not in errors
    (told,) = re.findall(r"^deepseek-moe \w+: interrupted; .*", errors, re.MULTILINE)
    if step is None:
        assert "run the same command again" in told
        assert not list(run.glob("checkpoints/checkpoint-*"))
        return
    checkpoint = last_complete_checkpoint(run / "checkpoints")
    assert checkpoint is not None and step_of(checkpoint) == step
    assert f"go on from step {step} in {run}" in told
    assert not RunFolder(run).is_finished


# What is interrupted, in which of its calls, and the step that is saved (12 steps; one is due at 4, 8 and 12).
MOMENTS = {
    "reading the data": (Corpus, "read", 1, None),
    "loading a batch": (PackedDataset, "__getitem__", 10, 2),
    "the optimizer's step": (torch.optim.AdamW, "step", 6, 6),
    "an evaluation": (HeldOut, "measure", 1, 4),
    "writing a checkpoint": (StageTrainer, "_save_checkpoint", 1, 4),
    "the last measurement": (HeldOut, "measure", 4, 12),
    "writing samples": (outcome, "set_seed", 1, 12),
}


@pytest.fixture
def command(tiny_settings, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_settings))
    return ["pretrain", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "run")]


QUICK = ("reading the data", "the last measurement")


@pytest.mark.parametrize(
    "moment", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MOMENTS]
)
def test_pretrain_leaves_the_last_whole_step(command, tmp_path, monkeypatch, capsys, moment):
    owner, name, call, step = MOMENTS[moment]
    number = list(NUMBERS)[len(moment) % 2]
    with monkeypatch.context() as patch:
        calls = send_in(patch, owner, name, call, number)
        code = main(command)
    assert calls[0] >= call
    check_stopped(capsys, code, number, tmp_path / "run", step)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
@pytest.mark.parametrize(("call", "step"), [(6, 6), (1, 1)])
def test_what_goes_on_ends_with_the_same_figures(command, tmp_path, monkeypatch, capsys, call, step):
    # Without checkpoints on the way: the one that the signal leaves is the only one.
    command = [*command, "--save-steps", "0", "--eval-steps", "0"]
    with monkeypatch.context() as patch:
        send_in(patch, torch.optim.AdamW, "step", call, signal.SIGTERM)
        code = main(command)
    check_stopped(capsys, code, signal.SIGTERM, tmp_path / "run", step)
    assert main(command) == 0
    assert main([*command[:-1], "0", "--output", str(tmp_path / "whole")]) == 0
    cut, whole = (RunFolder(tmp_path / name) for name in ("run", "whole"))
    assert cut.summary.results == whole.summary.results and cut.summary.samples == whole.summary.samples
    assert [row["step"] for row in cut.metrics if "loss" in row] == sorted({2, 4, 6, 8, 10, 12, step})


@pytest.mark.parametrize(
    ("owner", "name", "call", "step"),
    [
        pytest.param(ppo_trainer, "compute_targets", 2, 2, marks=pytest.mark.slow),  # the update is finished
        (Player, "_reference_and_values", 3, 1),  # generation is not: one batch before training, one for each update
        pytest.param(Player, "_score", 4, 2, marks=pytest.mark.slow),  # the evaluation at the end
        pytest.param(Player, "_score", 1, None, marks=pytest.mark.slow),
    ],
)
def test_align(policy_path, tmp_path, monkeypatch, capsys, owner, name, call, step):
    command = ["align", "align-debug", "--model", str(policy_path), "--output", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        send_in(patch, owner, name, call, signal.SIGINT)
        code = main(command)
    check_stopped(capsys, code, signal.SIGINT, tmp_path / "run", step)
    if (owner, call) == (Player, 3):
        assert main(command) == 0
        assert main([*command[:-1], str(tmp_path / "whole")]) == 0
        cut, whole = (RunFolder(tmp_path / name).summary for name in ("run", "whole"))
        assert cut.results == whole.results and cut.samples == whole.samples


@pytest.mark.parametrize(
    ("owner", "call", "step"), [(torch.optim.AdamW, 3, 3), pytest.param(HeldOutAnswers, 2, 6, marks=pytest.mark.slow)]
)
def test_sft(policy_path, tmp_path, monkeypatch, capsys, owner, call, step):
    command = ["sft", "sft-debug", "--model", str(policy_path), "--output", str(tmp_path / "run")]
    command += ["--max-steps", "6", "--save-steps", "0", "--report-to", "[]"]
    with monkeypatch.context() as patch:
        send_in(patch, owner, "step" if owner is torch.optim.AdamW else "measure", call, signal.SIGTERM)
        code = main(command)
    check_stopped(capsys, code, signal.SIGTERM, tmp_path / "run", step)


@pytest.mark.slow
def test_adapt(policy_path, tiny_data, tmp_path, monkeypatch, capsys):
    command = ["adapt", "adapt-debug", "--model", str(policy_path), "--output", str(tmp_path / "run")]
    command += ["--max-steps", "6", "--report-to", "[]", "--data", str(tiny_data), "--sequence-length", "32"]
    with monkeypatch.context() as patch:
        send_in(patch, torch.optim.AdamW, "step", 3, signal.SIGINT)
        code = main(command)
    check_stopped(capsys, code, signal.SIGINT, tmp_path / "run", 3)


SECOND = """
import os, signal, sys
from deepseek_records.stop_signals import deferred, stop_signals
with stop_signals(), deferred():
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("never")
"""
IN_A_FORK = """
import os, signal, sys, time
from deepseek_records.stop_signals import stop_signals
with stop_signals():
    child = os.fork()
    if not child:
        time.sleep(60)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    print(os.waitpid(child, 0)[1] == signal.SIGTERM)
"""


def test_a_second_signal_ends_at_once():
    done = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, check=False)
    assert done.returncode == 130 and done.stdout == "still here\n"
    assert "a second signal ends at once" in done.stderr and "Traceback" not in done.stderr


def test_a_forked_child_ends_by_the_signal_as_without_us():
    done = subprocess.run([sys.executable, "-c", IN_A_FORK], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


def test_undeferred_raises_what_was_noted():
    with pytest.raises(stop_signals.Interrupted), stop_signals.stop_signals(), stop_signals.deferred() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        with stop_signals.undeferred():
            pytest.fail("nothing inside may run")


@pytest.mark.slow
def test_a_real_ctrl_c_of_the_whole_group(command, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "deepseek_cli.main", *command, "--max-steps", "100000"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "run the same command again to go on from step" in errors


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_stop_after_the_same_step(command, tmp_path, number):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617"]
    process = subprocess.Popen(
        [*launcher, "-m", "deepseek_cli.main", *command, "--max-steps", "100000", "--save-steps", "0"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 200
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=90)
    checkpoint = last_complete_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None and f"go on from step {step_of(checkpoint)} in" in errors, errors[-3000:]
    assert {path.name for path in checkpoint.glob("rng_state_*")} == {"rng_state_0.pth", "rng_state_1.pth"}
