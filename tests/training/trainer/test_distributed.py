"""Several processes give the losses of one, resume, and leave a run folder and a model that one process reads.

Each engine is started as a user would, through its launcher and the command; tests assert which one really trained,
because on a CPU accelerate turns FSDP into plain data parallelism without a word.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deepseek_cli.main import main
from deepseek_records.loading import load_model
from deepseek_records.run_folder import RunFolder
from deepseek_training.recipes.loading import build_recipe
from deepseek_training.stages.pretrain import PretrainRecipe, pretrain
from deepseek_training.trainer.checkpoints import BEING_WRITTEN
from deepseek_training.trainer.distributed_engine import launch_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WORKER = str(Path(__file__).parents[1] / "engine_worker.py")
SAVING_WORKER = str(Path(__file__).parents[1] / "saving_worker.py")
COMMAND = ["-m", "deepseek_cli.main"]
CLOCKED = {"tokens_per_second", "peak_memory_gib", "mfu"}
ZERO3 = pytest.param(
    "zero3", marks=pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs deepspeed")
)
ENGINES = ["torchrun", "fsdp2", "fsdp2_sharded", ZERO3]
EXPECTED = {
    "torchrun": {
        "engine": "MULTI_CPU",
        "wrapper": "DistributedDataParallel",
        "parameters": ["Tensor"],
        "is_partitioned": False,
        "is_leaf": False,
    },
    "fsdp2": {
        "engine": "FSDP",
        "wrapper": "FSDPDeepseekForCausalLM",
        "parameters": ["DTensor"],
        "is_partitioned": False,
        "is_leaf": False,
    },
    "fsdp2_sharded": {
        "engine": "FSDP",
        "wrapper": "FSDPDeepseekForCausalLM",
        "parameters": ["DTensor"],
        "is_partitioned": False,
        "is_leaf": False,
    },
    "zero3": {
        "engine": "DEEPSPEED",
        "wrapper": "DeepSpeedEngine",
        "parameters": ["Tensor"],
        "is_partitioned": True,
        "is_leaf": True,
    },
}


@pytest.fixture(scope="module")
def settings(tiny_settings):
    """Eight blocks per step, clipped at each; no dropout, for its draws depend on how the batch is split."""
    model = {"router_bias_update_speed": 0.01, "seq_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01}
    return {**tiny_settings, "model": model, "batch_size": 8, "max_grad_norm": 0.5}


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory):
    path = tmp_path_factory.mktemp("alone") / "run"
    pretrain(build_recipe(settings, PretrainRecipe), path)
    return RunFolder(path)


@pytest.fixture(scope="module")
def launched(settings, tmp_path_factory):
    """Runs of two processes, two blocks each, two passes per step; each engine's is made once."""
    made = {}

    def run(engine):
        if engine not in made:
            made[engine] = tmp_path_factory.mktemp(engine) / "run"
            launch(engine, settings, made[engine])
        return RunFolder(made[engine])

    return run


def launch(engine, settings, output, program=(WORKER,), processes=2, **environment):
    """Train with eight blocks a step, in two passes of this many processes."""
    recipe = output.parent / "recipe.yaml"
    step = {"batch_size": 4 // processes, "gradient_accumulation_steps": 2}
    recipe.write_text(yaml.safe_dump({**settings, **step}))
    if engine == "torchrun":
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    else:
        launcher = ["accelerate.commands.accelerate_cli", "launch", f"--num_processes={processes}"]
        launcher += ["--config_file", str(launch_config(engine))]
    command = [sys.executable, "-m", *launcher, *program, "pretrain", str(recipe), "--output", str(output)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    )
    assert (done.returncode == 0) != bool(environment), done.stderr[-3000:]
    return done.stderr if environment else done.stdout


def trace(run):
    return [{key: value for key, value in row.items() if key not in CLOCKED} for row in run.metrics]


def assert_same_trace(alone, run):
    assert [row["step"] for row in run.metrics] == [row["step"] for row in alone.metrics]  # one process writes
    for key in ("loss", "grad_norm", "eval_tales_bits_per_byte", "router_bias_range", "expert_top_p"):
        expected, found = ([row[key] for row in one.metrics if key in row] for one in (alone, run))
        assert found == pytest.approx(expected, rel=2e-4) and found, key


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_like_one(engine, launched, alone):
    run = launched(engine)
    ranks = [json.loads((run.path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for found in ranks:
        assert found["num_processes"] == 2 and found["backend"] == "gloo"
        assert {key: found[key] for key in EXPECTED[engine]} == EXPECTED[engine]
    assert ranks[0] == ranks[1] and ranks[0]["counts"], "the same biases and counts everywhere"
    assert_same_trace(alone, run)
    assert max(row["grad_norm"] for row in alone.metrics if "loss" in row) > 0.5, "clipping matters"


@pytest.mark.parametrize("engine", ENGINES)
def test_one_process_loads_what_two_have_saved(engine, launched, alone):
    run = launched(engine)
    one, two = (load_file(folder.model_path / "model.safetensors") for folder in (alone, run))
    tied = {"lm_head.weight"}  # FSDP writes it too, though it is the embedding's
    assert one.keys() | tied == two.keys() | tied  # the official per-expert names
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-3, msg=lambda m, n=name: f"{n} {m}")
        if name.endswith("e_score_correction_bias"):
            torch.testing.assert_close(two[name], value, rtol=0, atol=1e-7)  # the sign rule hides rounding
    assert {path.name for path in run.model_path.iterdir()} == {path.name for path in alone.model_path.iterdir()}
    tokens = torch.arange(3, 40).unsqueeze(0)
    logits = [AutoModelForCausalLM.from_pretrained(folder.model_path)(tokens).logits for folder in (alone, run)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=5e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stopped_run_goes_on(engine, launched, settings, tmp_path):
    """Stopped at step 7 of 12, with a checkpoint at 4, it ends with the bits of the one that was left alone."""
    whole, path = launched(engine), tmp_path / "run"
    launch(engine, settings, path, STOP_AT="7")
    assert [folder.name for folder in (path / "checkpoints").iterdir()] == ["checkpoint-4"]
    printed = launch(engine, settings, path, program=COMMAND)
    assert printed.count("bits per byte") == 1, "one process reports"
    assert trace(RunFolder(path)) == trace(whole)
    expected = load_file(whole.model_path / "model.safetensors")
    found = load_file(path / "model" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("engine", ["fsdp2", ZERO3])
def test_a_run_stopped_after_its_last_step_trains_no_further(engine, launched, settings, tmp_path):
    path = tmp_path / "run"
    launch(engine, {**settings, "max_steps": 4}, path)
    expected = load_file(path / "model" / "model.safetensors")
    (path / "summary.json").unlink()
    launch(engine, {**settings, "max_steps": 4}, path)
    found = load_file(path / "model" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.fixture(scope="module")
def split_settings(settings):
    """Four experts per process, the number a token uses varying, by fused_moe."""
    return {**settings, "model": {**settings["model"], "tie_word_embeddings": False}, "expert_parallel_size": 2}


@pytest.fixture(scope="module")
def split_run(split_settings, tmp_path_factory):
    path = tmp_path_factory.mktemp("split") / "run"
    launch("expert_parallel", split_settings, path)
    return RunFolder(path)


def test_split_experts_train_like_whole_ones(split_settings, split_run, tmp_path):
    pretrain(build_recipe({**split_settings, "expert_parallel_size": 1}, PretrainRecipe), tmp_path / "alone")
    alone, run = RunFolder(tmp_path / "alone"), split_run
    ranks = [json.loads((run.path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1] and ranks[0]["counts"]
    assert ranks[0]["num_local_experts"] == 4 and "DTensor" in ranks[0]["parameters"]  # a norm and the head stay whole
    assert_same_trace(alone, run)
    one, two = (load_file(folder.model_path / "model.safetensors") for folder in (alone, run))
    assert one.keys() == two.keys() and not (run.path / "unsplit").exists()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-3, msg=lambda m, n=name: f"{n} {m}")
    AutoModelForCausalLM.from_pretrained(run.model_path)


def test_a_stopped_run_of_split_experts_goes_on(split_settings, split_run, tmp_path):
    path = tmp_path / "run"
    launch("expert_parallel", split_settings, path, STOP_AT="7")
    assert [folder.name for folder in (path / "checkpoints").iterdir()] == ["checkpoint-4"]
    launch("expert_parallel", split_settings, path, program=COMMAND)
    assert trace(RunFolder(path)) == trace(split_run)
    expected = load_file(split_run.model_path / "model.safetensors")
    found = load_file(path / "model" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(("engine", "begun", "ended"), [("torchrun", 2, 4), ("fsdp2", 4, 2), ("torchrun", 4, 1)])
def test_a_run_goes_on_in_another_number_of_processes(engine, begun, ended, settings, launched, tmp_path):
    """The same rows of every step, so the same losses, and no process's part is lost or doubled."""
    path = tmp_path / "run"
    launch(engine, settings, path, processes=begun, STOP_AT="7")
    launch(engine, settings, path, program=COMMAND, processes=ended)
    assert_same_trace(launched(engine), RunFolder(path))


@pytest.mark.parametrize(("begun", "ended", "size"), [(2, 4, 4), (4, 2, 2)])
def test_split_experts_go_on_in_another_number_of_processes(begun, ended, size, split_settings, split_run, tmp_path):
    path = tmp_path / "run"
    launch("expert_parallel", split_settings, path, processes=begun, STOP_AT="7")
    launch("expert_parallel", {**split_settings, "expert_parallel_size": size}, path, program=COMMAND, processes=ended)
    assert_same_trace(split_run, RunFolder(path))


@pytest.mark.parametrize(
    ("fault", "message", "processes"),
    [
        ("kill", "process 0 of 2 was left alone in step 9, another is gone", (2, 1)),
        ("full", "process 1 could not write its part of checkpoint-8, is the disk full?", (4,)),
    ],
)
def test_a_checkpoint_that_not_all_have_written_is_not_chosen(fault, message, processes, settings, launched, tmp_path):
    """At step 8 one process is killed, or its disk is full, after the weights; the one of step 4 stands."""
    whole, path = launched("fsdp2_sharded"), tmp_path / "run"
    told = launch("fsdp2_sharded", settings, path, program=[SAVING_WORKER], FAULT=fault, SAVE_STEP="8")
    assert "deepseek-moe pretrain: error: " in told and message in told
    assert {folder.name for folder in (path / "checkpoints").iterdir()} == {"checkpoint-4", BEING_WRITTEN}
    for count in processes:
        again = tmp_path / str(count) / "run"
        shutil.copytree(path, again)
        launch("fsdp2_sharded", settings, again, program=COMMAND, processes=count)
        assert_same_trace(whole, RunFolder(again))
        if count == 2:
            assert trace(RunFolder(again)) == trace(whole)
        one, two = (load_file(folder / "model" / "model.safetensors") for folder in (whole.path, again))
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=0, atol=0 if count == 2 else 2e-3)


def test_a_checkpoint_written_in_the_background_is_of_its_step(settings, launched, tmp_path):
    """Training was two steps further when step 4 was written; in the writing of step 8 a process is killed."""
    whole, path = launched("fsdp2_sharded"), tmp_path / "run"
    behind = {**settings, "save_in_background": True}
    told = launch("fsdp2_sharded", behind, path, program=[SAVING_WORKER], FAULT="kill", SAVE_STEP="8")
    # The launcher stops the other one, or it finds itself alone before.
    assert "another is gone; the same command goes on" in told or "interrupted; " in told, told[-3000:]
    assert {folder.name for folder in (path / "checkpoints").iterdir()} == {"checkpoint-4", BEING_WRITTEN}
    launch("fsdp2_sharded", behind, path, program=COMMAND)
    assert [folder.name for folder in (path / "checkpoints").iterdir()] == ["checkpoint-12"]
    assert trace(RunFolder(path)) == trace(whole)
    expected, found = (load_file(folder / "model" / "model.safetensors") for folder in (whole.path, path))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_full_disk_is_told_of_by_all_that_save_in_the_background(settings, tmp_path):
    path = tmp_path / "run"
    behind = {**settings, "save_in_background": True}
    told = launch("fsdp2_sharded", behind, path, program=[SAVING_WORKER], FAULT="full", SAVE_STEP="8")
    assert told.count("process 1 could not write its part of checkpoint-8, is the disk full?") == 2
    assert (path / "checkpoints" / "checkpoint-4").is_dir()


def test_split_experts_are_saved_in_the_background(split_settings, split_run, tmp_path):
    path = tmp_path / "run"
    behind = {**split_settings, "save_in_background": True}
    launch("expert_parallel", behind, path, STOP_AT="11")
    launch("expert_parallel", split_settings, path, program=COMMAND)  # it may change on the way
    assert trace(RunFolder(path)) == trace(split_run)


def test_sharded_and_whole_checkpoints_end_with_the_same_bits(launched):
    whole, sharded = launched("fsdp2"), launched("fsdp2_sharded")
    assert trace(whole) == trace(sharded)
    expected, found = (load_file(run.model_path / "model.safetensors") for run in (whole, sharded))
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("engine", ["fsdp2_sharded", "expert_parallel"])
def test_export_puts_the_parts_together(engine, request, tmp_path, capsys):
    """No process group is needed; the last checkpoint's weights are the run's model."""
    sharded = engine == "fsdp2_sharded"
    run = request.getfixturevalue("launched")(engine) if sharded else request.getfixturevalue("split_run")
    checkpoint = run.path / "checkpoints" / "checkpoint-12"
    assert main(["export", str(checkpoint), str(tmp_path / "whole")]) == 0
    assert re.search(r"whole checkpoint .*: 1\.\d\d MB in \d+\.\d s", capsys.readouterr().out)
    expected, found = (load_file(path / "model.safetensors") for path in (run.model_path, tmp_path / "whole"))
    assert expected.keys() - {"lm_head.weight"} == found.keys() - {"lm_head.weight"}
    assert all(torch.equal(found[name], expected[name]) for name in found)
    names = [{path.name for path in folder.iterdir()} for folder in (run.model_path, tmp_path / "whole")]
    assert names[0] == names[1]  # the configuration, the code and the tokenizer too
    tokens = torch.arange(3, 40).unsqueeze(0)
    logits = [load_model(path)(tokens).logits for path in (run.model_path, tmp_path / "whole")]
    assert torch.equal(*logits)
    assert main(["generate", str(checkpoint), "--prompt", "x"]) == 2
    assert "was written in parts by several processes; put them together first" in capsys.readouterr().err
