"""SIGKILL at random moments, over and over: the run still ends with the bits of one that was left alone."""

import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from kill_worker import train
from safetensors.torch import load_file

from deepseek_records.run_folder import RunFolder
from deepseek_training.trainer.checkpoints import BEING_WRITTEN, MARKER_FILE, is_complete

NUM_KILLS = 12
SAVE_STEPS = 5
CLOCKED = {"tokens_per_second", "peak_memory_gib", "mfu"}


def wait_for_step(path, step):
    """Return once the log has reached a step."""
    while True:
        if (path / "metrics.jsonl").exists() and any(row["step"] >= step for row in RunFolder(path).metrics):
            return
        yield


def wait_for_half_a_checkpoint(path, step):
    """Return while a checkpoint at or after a step is being written: its folder is there, its marker is not."""
    while True:
        for folder in (path / "checkpoints" / BEING_WRITTEN).glob("checkpoint-*"):
            if int(folder.name.split("-")[1]) >= step and not (folder / MARKER_FILE).exists():
                return
        yield


def kill_when(waiting, process):
    for _ in waiting:
        if not process.is_alive():
            return False
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def final_state(path):
    """Whatever the end of a run consists of, in one flat dictionary; the times are left out."""
    checkpoint = path / "checkpoints" / "checkpoint-60"
    state = {f"weight {name}": value for name, value in load_file(path / "model" / "model.safetensors").items()}
    flatten(torch.load(checkpoint / "optimizer.pt", weights_only=True), "optimizer", state)
    flatten(torch.load(checkpoint / "scheduler.pt", weights_only=True), "scheduler", state)
    flatten(torch.load(checkpoint / "rng_state.pth", weights_only=False), "random state", state)
    flatten([{k: v for k, v in row.items() if k not in CLOCKED} for row in RunFolder(path).metrics], "trace", state)
    return state


def flatten(value, name, into):
    if isinstance(value, dict):
        for key, part in value.items():
            flatten(part, f"{name}.{key}", into)
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            flatten(part, f"{name}.{number}", into)
    else:
        into[name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def is_same(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_a_dozen_times_it_ends_bit_for_bit_the_same(tiny_settings, tmp_path):
    settings = {**tiny_settings, "max_steps": 60, "save_steps": SAVE_STEPS, "logging_steps": 1, "eval_steps": 20}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepseek_training.stages.pretrain"])
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = context.Process(target=train, args=(settings, whole))
    process.start()
    process.join()
    assert process.exitcode == 0
    generator, num_killed, half_written, expected_starts = random.Random(0), 0, [], []
    for number in range(NUM_KILLS):
        process = context.Process(target=train, args=(settings, broken))
        process.start()
        step = min(4 * number + generator.randint(1, 5), 55)
        is_saving = number % 3 == 1
        waiting = wait_for_half_a_checkpoint(broken, step) if is_saving else wait_for_step(broken, step)
        num_killed += kill_when(waiting, process)
        folders = list((broken / "checkpoints").glob("checkpoint-*"))
        half_written += (broken / "checkpoints" / BEING_WRITTEN).glob("checkpoint-*")
        complete = [folder for folder in folders if is_complete(folder)]
        expected_starts += sorted(complete, key=lambda folder: int(folder.name.split("-")[1]))[-1:]
    assert num_killed >= 10 and len(half_written) >= 3
    process = context.Process(target=train, args=(settings, broken))
    process.start()
    process.join()
    assert process.exitcode == 0
    said = broken.with_suffix(".log").read_text()
    assert all(f"{folder} is incomplete" in said for folder in half_written)
    starts = [line.split("going on from ")[1] for line in said.splitlines() if "going on from" in line]
    remaining = iter(map(str, expected_starts))  # a process killed as it began has said nothing
    assert len(starts) >= 8 and all(start in remaining for start in starts), "the last complete checkpoint, each time"
    expected, found = final_state(whole), final_state(broken)
    assert expected.keys() == found.keys()
    assert [name for name, value in expected.items() if not is_same(value, found[name])] == []
    for part in ("e_score_correction_bias", "share.state", "exp_avg_sq", "random state.cpu", "trace.10.loss"):
        assert any(part in name for name in expected), part
