"""PPO in two processes under accelerate (gloo, CPU): the numbers of one, and whole checkpoints.

All of our cases run in one launch, for starting the processes is what takes the time.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import ppo_worker
import pytest
import torch
from ppo_parts import make_ours
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from deepseek_records.run_folder import RunFolder
from deepseek_training.ppo.checkpoint import last_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CASES = ("train", "evaluate_and_resume", "learn_lora", "fail_in_one", "learn_from_given_rollouts")
CLOCKED = ("eps", "time/", "tokens_per_second")


def launch(folder, kind, *names):
    """Run the cases in two processes and return each one's pair of results."""
    worker = Path(__file__).parents[1] / "ppo_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(worker)]
    done = subprocess.run(
        [*command, str(folder), kind, *names],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)] for name in names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder):
    return launch(folder, "ours", *CASES)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="TRL saves the DDP wrapper")
def test_stock_cannot_save_in_two_processes(tmp_path):
    launch(tmp_path, "stock", "train")


def assert_same_weights(left, right):
    assert left["weights"].keys() == right["weights"].keys()
    assert all(torch.equal(left["weights"][name], right["weights"][name]) for name in left["weights"])


def test_trains_and_saves(two, folder):
    left, right = two["train"]
    assert left["engine"] == "MULTI_CPU" and left["num_processes"] == 2
    assert_same_weights(left, right)
    assert [row["step"] for row in left["rows"]] == [1, 2, 3, 4]
    for saved in (folder / "train" / "policy", folder / "train" / "checkpoint-4"):
        policy = LlamaForCausalLM.from_pretrained(saved)
        assert torch.equal(policy.lm_head.weight, left["weights"]["policy.lm_head.weight"])


def test_learns_from_the_same_rollouts_what_one_process_learns(two, tmp_path):
    one = ppo_worker.learn_from_given_rollouts(make_ours, tmp_path, 1)
    assert one["num_processes"] == 1
    left, right = two["learn_from_given_rollouts"]
    assert_same_weights(left, right)
    for mine, theirs in zip(left["rows"], one["rows"], strict=True):
        for name in theirs:
            if not any(part in name for part in (*CLOCKED, "ratio_var")):
                assert mine[name] == pytest.approx(theirs[name], abs=2e-5, rel=1e-4), name
    for name, weight in one["weights"].items():
        torch.testing.assert_close(left["weights"][name], weight, atol=2e-5, rtol=0)


def test_evaluates_all_and_resumes_bit_for_bit(two, folder):
    (whole, resumed), (whole_2, resumed_2) = two["evaluate_and_resume"]
    assert whole["held_out"] == 11
    states = json.loads((folder / "resume" / "checkpoint-4" / "ppo_state.json").read_text())["reward"]
    assert states == [{"calls": 4}, {"calls": 104}]  # each process's own
    assert_same_weights(whole, whole_2)
    assert_same_weights(whole, resumed)
    assert_same_weights(resumed, resumed_2)
    for mine, theirs in zip(resumed["rows"], whole["rows"], strict=True):
        for name, value in theirs.items():
            if not any(part in name for part in CLOCKED):
                assert mine[name] == value, name


def test_one_process_refuses_the_checkpoint_of_two(two, folder, tmp_path):
    trainer = make_ours(tmp_path)
    with pytest.raises(ValueError, match="of 2 processes, expected one of 1, as in this training"):
        trainer.train(resume_from_checkpoint=folder / "resume" / "checkpoint-2")


def test_lora_with_shared_weights(two, folder):
    left, right = two["learn_lora"]
    assert_same_weights(left, right)
    assert (folder / "lora" / "checkpoint-4" / "value_model" / "adapter_model.safetensors").exists()


def test_a_reward_failing_in_one_process_stops_both_with_a_checkpoint(two, folder):
    assert two["fail_in_one"] == ["step 3: OSError: the scorer is gone"] * 2
    assert last_checkpoint(folder / "fail").name == "checkpoint-2"


def test_the_command_runs_in_two_processes(policy_path, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    settings = ["--model", str(policy_path), "--output", str(tmp_path / "run"), "--num-eval-prompts", "9"]
    done = subprocess.run(
        [*launcher, "deepseek_cli.main", "align", "align-debug", *settings],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("held-out reward") == 1
    run = RunFolder(tmp_path / "run")
    assert [row["step"] for row in run.metrics] == [0, 1, 2, 2]  # written by one process only
    assert run.metrics[2]["episode"] == 2 * 8 * 2
    assert run.summary.gain.n == 9
    AutoModelForCausalLM.from_pretrained(run.model_path)
    AutoModelForSequenceClassification.from_pretrained(run.path / "value_model")
