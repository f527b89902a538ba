"""SIGKILL at random moments, over and over: the run still ends with the bits of one that was left alone."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from deepseek_model_cards.run_folder import RunFolder
from deepseek_training.checkpoints import MARKER_FILE
from deepseek_training.pretrain import PretrainRecipe, pretrain
from deepseek_training.recipe import build_recipe

NUM_KILLS = 12
SAVE_STEPS = 5
CLOCKED = {"tokens_per_second", "peak_memory_gib", "mfu"}


def train(settings, path):
    os.setpgrp()
    torch.set_num_threads(1)
    pretrain(build_recipe(settings, PretrainRecipe), path)


def wait_for_step(path, step):
    """Return once the log has reached a step."""
    while True:
        if (path / "metrics.jsonl").exists() and any(row["step"] >= step for row in RunFolder(path).metrics):
            return
        yield


def wait_for_half_a_checkpoint(path, step):
    """Return while a checkpoint at or after a step is being written: its folder is there, its marker is not."""
    while True:
        for folder in (path / "checkpoints").glob("checkpoint-*"):
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
    checkpoint = path / "checkpoints" / "checkpoint-60"
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    from safetensors.torch import load_file

    weights = load_file(path / "model" / "model.safetensors")
    moments = {f"{index}.{key}": value for index, one in optimizer.items() for key, value in one.items()}
    trace = [{k: v for k, v in row.items() if k not in CLOCKED} for row in RunFolder(path).metrics]
    return weights, moments, trace


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_a_dozen_times_it_ends_bit_for_bit_the_same(tiny_settings, tmp_path):
    settings = {**tiny_settings, "max_steps": 60, "save_steps": SAVE_STEPS, "logging_steps": 1, "eval_steps": 20}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepseek_training.pretrain"])
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = context.Process(target=train, args=(settings, whole))
    process.start()
    process.join()
    assert process.exitcode == 0
    generator, num_killed, num_half_written = random.Random(0), 0, 0
    for number in range(NUM_KILLS):
        process = context.Process(target=train, args=(settings, broken))
        process.start()
        step = min(4 * number + generator.randint(1, 5), 55)
        is_saving = number % 3 == 1
        waiting = wait_for_half_a_checkpoint(broken, step) if is_saving else wait_for_step(broken, step)
        num_killed += kill_when(waiting, process)
        folders = list((broken / "checkpoints").glob("checkpoint-*"))
        num_half_written += any(not (folder / MARKER_FILE).exists() for folder in folders)
    assert num_killed >= 10 and num_half_written >= 3
    process = context.Process(target=train, args=(settings, broken))
    process.start()
    process.join()
    assert process.exitcode == 0
    for left, right in zip(final_state(whole)[:2], final_state(broken)[:2], strict=True):
        assert left.keys() == right.keys() and left
        assert all(torch.equal(left[name], right[name]) for name in left)
    assert any("e_score_correction_bias" in name for name in final_state(whole)[0])
    assert any("share.state" in name for name in final_state(whole)[0])
    assert final_state(whole)[2] == final_state(broken)[2]
