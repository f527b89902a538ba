"""Several processes give the losses of one, and leave a run folder and a model that one process reads.

Each test asserts which engine really ran: on a CPU accelerate turns a misconfigured FSDP into plain data parallelism
without a word.
"""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deepseek_model_cards.run_folder import RunFolder
from deepseek_training.pretrain import PretrainRecipe, pretrain
from deepseek_training.recipe import build_recipe

WORKER = """
import json, sys
from accelerate import PartialState
from deepseek_training import stage_trainer
from deepseek_training.pretrain import PretrainRecipe, pretrain
from deepseek_training.recipe import build_recipe

settings, output = json.loads(sys.argv[1]), sys.argv[2]
pretrain(build_recipe(settings, PretrainRecipe), output)
state = PartialState()
with open(f"{output}/rank{state.process_index}.json", "w") as file:
    json.dump({"engine": state.distributed_type.value, "num_processes": state.num_processes}, file)
"""


@pytest.fixture(scope="module")
def settings(tiny_settings):
    """Eight blocks a step in all; no dropout, for its draws depend on how the batch is split."""
    return {**tiny_settings, "model": {"router_bias_update_speed": 0.01}, "batch_size": 8, "max_steps": 8}


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory):
    path = tmp_path_factory.mktemp("alone") / "run"
    pretrain(build_recipe(settings, PretrainRecipe), path)
    return path


def launch(settings, output, num_processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    worker = output.parent / "worker.py"
    worker.write_text(WORKER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(worker), json.dumps(settings), str(output)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(num_processes)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_train_like_one(settings, alone, tmp_path):
    ranks = launch({**settings, "batch_size": 4}, tmp_path / "run")
    assert ranks == [{"engine": "MULTI_CPU", "num_processes": 2}] * 2
    one, two = RunFolder(alone), RunFolder(tmp_path / "run")
    assert [row["step"] for row in one.metrics] == [row["step"] for row in two.metrics]  # written by one process only
    losses = [[row["loss"] for row in run.metrics if "loss" in row] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert one.summary["results"][0]["value"] == pytest.approx(two.summary["results"][0]["value"], rel=1e-4)
    assert one.summary["num_training_tokens"] == two.summary["num_training_tokens"]
    left, right = (load_file(run.model_path / "model.safetensors") for run in (one, two))
    biases = [name for name in left if "e_score_correction_bias" in name]
    assert biases and all((left[name] == right[name]).all() for name in biases)  # the sign rule hides rounding
    AutoModelForCausalLM.from_pretrained(two.model_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_resume(settings, tmp_path):
    """The run is cut back to its last checkpoint; both processes go on from it."""
    settings = {**settings, "batch_size": 4}
    launch(settings, tmp_path / "run")
    whole = RunFolder(tmp_path / "run").metrics
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    (tmp_path / "run" / "summary.json").unlink()
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-8"
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    launch(settings, tmp_path / "run")
    again = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all((weights[name] == again[name]).all() for name in weights)
    assert [row["step"] for row in RunFolder(tmp_path / "run").metrics] == [row["step"] for row in whole]
