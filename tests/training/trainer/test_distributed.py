"""Several processes give the losses of one, resume, and leave a run folder and a model that one process reads.

Each engine is started as a user would, through its launcher and the command; tests assert which one really trained,
because on a CPU accelerate turns FSDP into plain data parallelism without a word. What needs no processes of its own
shares those of its engine: to start them is what takes the time.
"""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from process_jobs import NEEDS_DEEPSPEED, run_jobs, start
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deepseek_cli.main import main
from deepseek_records.loading import load_model
from deepseek_records.run_folder import RunFolder
from deepseek_training.recipes.loading import build_recipe
from deepseek_training.stages.pretrain import PretrainRecipe, pretrain
from deepseek_training.trainer.checkpoints import BEING_WRITTEN

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SAVING_WORKER = str(Path(__file__).parents[1] / "saving_worker.py")
COMMAND = ["-m", "deepseek_cli.main"]
CLOCKED = {"tokens_per_second", "peak_memory_gib", "mfu"}
ZERO3 = pytest.param("zero3", marks=NEEDS_DEEPSPEED)
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


def command(settings, output, processes=2):
    """A training with eight blocks a step, in two passes of this many processes."""
    output.parent.mkdir(parents=True, exist_ok=True)
    recipe = output.parent / f"recipe-{processes}.yaml"
    step = {"batch_size": 4 // processes, "gradient_accumulation_steps": 2}
    recipe.write_text(yaml.safe_dump({**settings, **step}))
    return ["pretrain", str(recipe), "--output", str(output)]


class Runs:
    """What two processes of one engine have trained, two blocks each, by one start.

    ``run`` was left alone; ``again`` stopped at step 7 of 12, with a checkpoint at 4, and was begun again; ``ended``
    stopped after its last step, before its model was written; ``begun`` stopped at step 7.
    """

    def __init__(self, engine, settings, folder):
        self.folder = folder
        again, ended = (command(settings, folder / name) for name in ("again", "ended"))
        jobs = [
            {"name": "run", "words": command(settings, folder / "run")},
            {"name": "stopped", "words": again, "stop_at": 7},
            {"name": "again", "words": again},
            {"name": "ended", "words": ended, "stop_at": "end"},
            {"name": "ended-again", "words": ended},
            {"name": "begun", "words": command(settings, folder / "begun"), "stop_at": 7},
        ]
        self.processes = run_jobs(engine, 2, jobs, folder)

    def __getitem__(self, name):
        return RunFolder(self.folder / name)


@pytest.fixture(scope="module")
def launched(settings, split_settings, tmp_path_factory):
    """The `Runs` of an engine, made once."""
    made = {}

    def runs(engine):
        if engine not in made:
            own = split_settings if engine == "expert_parallel" else settings
            made[engine] = Runs(engine, own, tmp_path_factory.mktemp(engine))
        return made[engine]

    return runs


@pytest.fixture(scope="module")
def split_settings(settings):
    """Four experts per process, the number a token uses varying, by fused_moe."""
    return {**settings, "model": {**settings["model"], "tie_word_embeddings": False}, "expert_parallel_size": 2}


def launch(engine, settings, output, program=COMMAND, processes=2, **environment):
    """Train in processes of its own; with a fault in the environment, what was told."""
    done = start(engine, processes, [*program, *command(settings, output, processes)], **environment)
    assert (done.returncode == 0) != bool(environment), done.stderr[-3000:]
    return done.stderr


def trace(run):
    return [{key: value for key, value in row.items() if key not in CLOCKED} for row in run.metrics]


def assert_same_trace(alone, run):
    assert [row["step"] for row in run.metrics] == [row["step"] for row in alone.metrics]  # one process writes
    for key in ("loss", "grad_norm", "eval_tales_bits_per_byte", "router_bias_range", "expert_top_p"):
        expected, found = ([row[key] for row in one.metrics if key in row] for one in (alone, run))
        assert found == pytest.approx(expected, rel=2e-4) and found, key


def assert_same_bits(whole, run):
    """The same trace and the same model, to the bit."""
    assert trace(run) == trace(whole)
    expected, found = (load_file(one.model_path / "model.safetensors") for one in (whole, run))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_like_one(engine, launched, alone):
    runs = launched(engine)
    ranks = [process["run"]["trained"] for process in runs.processes]
    for found in ranks:
        assert found["num_processes"] == 2 and found["backend"] == "gloo"
        assert {key: found[key] for key in EXPECTED[engine]} == EXPECTED[engine]
    assert ranks[0] == ranks[1] and ranks[0]["counts"], "the same biases and counts everywhere"
    assert_same_trace(alone, runs["run"])
    assert max(row["grad_norm"] for row in alone.metrics if "loss" in row) > 0.5, "clipping matters"


@pytest.mark.parametrize("engine", ENGINES)
def test_one_process_loads_what_two_have_saved(engine, launched, alone):
    run = launched(engine)["run"]
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


@pytest.mark.parametrize("engine", [*ENGINES, "expert_parallel"])
def test_a_stopped_run_goes_on(engine, launched):
    runs = launched(engine)
    assert [folder.name for folder in (runs["begun"].path / "checkpoints").iterdir()] == ["checkpoint-4"]
    printed = [process["again"]["stdout"].count("bits per byte") for process in runs.processes]
    assert printed == [1, 0], "one process reports"
    assert_same_bits(runs["run"], runs["again"])


@pytest.mark.parametrize("engine", [*ENGINES, "expert_parallel"])
def test_a_run_stopped_after_its_last_step_trains_no_further(engine, launched):
    runs = launched(engine)
    assert [one["ended"]["code"] for one in runs.processes] == ["stopped", "stopped"]
    assert_same_bits(runs["run"], runs["ended"])


def test_split_experts_train_like_whole_ones(split_settings, launched, tmp_path):
    pretrain(build_recipe({**split_settings, "expert_parallel_size": 1}, PretrainRecipe), tmp_path / "alone")
    runs, alone = launched("expert_parallel"), RunFolder(tmp_path / "alone")
    ranks, run = [process["run"]["trained"] for process in runs.processes], runs["run"]
    assert ranks[0] == ranks[1] and ranks[0]["counts"]
    assert ranks[0]["num_local_experts"] == 4 and "DTensor" in ranks[0]["parameters"]  # a norm and the head stay whole
    assert_same_trace(alone, run)
    one, two = (load_file(folder.model_path / "model.safetensors") for folder in (alone, run))
    assert one.keys() == two.keys() and not (run.path / "unsplit").exists()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-3, msg=lambda m, n=name: f"{n} {m}")
    AutoModelForCausalLM.from_pretrained(run.model_path)


@pytest.fixture(scope="module")
def four(settings, split_settings, launched, tmp_path_factory):
    """Runs of four processes: begun by two, or to be ended by fewer."""
    made = {}

    def runs(engine):
        if engine not in made:
            folder = made[engine] = tmp_path_factory.mktemp(f"{engine}-four")
            own = {**split_settings, "expert_parallel_size": 4} if engine == "expert_parallel" else settings
            jobs = [{"name": "begun", "words": command(own, folder / "begun", 4), "stop_at": 7}]
            if engine != "fsdp2":
                shutil.copytree(launched(engine)["begun"].path, folder / "ended")
                jobs.append({"name": "ended", "words": command(own, folder / "ended", 4)})
            run_jobs(engine, 4, jobs, folder)
        return made[engine]

    return runs


@pytest.mark.parametrize("engine", ["torchrun", "expert_parallel"])
def test_a_run_of_two_processes_goes_on_in_four(engine, launched, four):
    """The same rows of every step, so the same losses, and no process's part is lost or doubled."""
    assert_same_trace(launched(engine)["run"], RunFolder(four(engine) / "ended"))


@pytest.mark.parametrize(("engine", "ended"), [("fsdp2", 2), ("torchrun", 1), ("expert_parallel", 2)])
def test_a_run_of_four_processes_goes_on_in_fewer(engine, ended, settings, split_settings, launched, four):
    own = split_settings if engine == "expert_parallel" else settings
    launch(engine, own, four(engine) / "begun", processes=ended)
    assert_same_trace(launched(engine)["run"], RunFolder(four(engine) / "begun"))


@pytest.mark.parametrize(
    ("fault", "message", "processes"),
    [
        ("kill", "process 0 of 2 was left alone in step 9, another is gone", (2, 1)),
        ("full", "process 1 could not write its part of checkpoint-8, is the disk full?", (4,)),
    ],
)
def test_a_checkpoint_that_not_all_have_written_is_not_chosen(fault, message, processes, settings, launched, tmp_path):
    """At step 8 one process is killed, or its disk is full, after the weights; the one of step 4 stands."""
    whole, path = launched("fsdp2_sharded")["run"], tmp_path / "run"
    told = launch("fsdp2_sharded", settings, path, program=[SAVING_WORKER], FAULT=fault, SAVE_STEP="8")
    assert "deepseek-moe pretrain: error: " in told and message in told
    assert {folder.name for folder in (path / "checkpoints").iterdir()} == {"checkpoint-4", BEING_WRITTEN}
    for count in processes:
        again = tmp_path / str(count) / "run"
        shutil.copytree(path, again)
        launch("fsdp2_sharded", settings, again, processes=count)
        if count == 2:
            assert_same_bits(whole, RunFolder(again))
        assert_same_trace(whole, RunFolder(again))
        one, two = (load_file(folder / "model" / "model.safetensors") for folder in (whole.path, again))
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=0, atol=2e-3)


def test_a_checkpoint_written_in_the_background_is_of_its_step(settings, launched, tmp_path):
    """Training was two steps further when step 4 was written; in the writing of step 8 a process is killed."""
    whole, path = launched("fsdp2_sharded")["run"], tmp_path / "run"
    behind = {**settings, "save_in_background": True}
    told = launch("fsdp2_sharded", behind, path, program=[SAVING_WORKER], FAULT="kill", SAVE_STEP="8")
    # The launcher stops the other one, or it finds itself alone before.
    assert "another is gone; the same command goes on" in told or "interrupted; " in told, told[-3000:]
    assert {folder.name for folder in (path / "checkpoints").iterdir()} == {"checkpoint-4", BEING_WRITTEN}
    launch("fsdp2_sharded", behind, path)
    assert [folder.name for folder in (path / "checkpoints").iterdir()] == ["checkpoint-12"]
    assert_same_bits(whole, RunFolder(path))


def test_a_full_disk_is_told_of_by_all_that_save_in_the_background(settings, tmp_path):
    path = tmp_path / "run"
    behind = {**settings, "save_in_background": True}
    told = launch("fsdp2_sharded", behind, path, program=[SAVING_WORKER], FAULT="full", SAVE_STEP="8")
    assert told.count("process 1 could not write its part of checkpoint-8, is the disk full?") == 2
    assert (path / "checkpoints" / "checkpoint-4").is_dir()


def test_split_experts_are_saved_in_the_background(split_settings, launched, tmp_path):
    path = tmp_path / "run"
    words = command({**split_settings, "save_in_background": True}, path)
    run_jobs("expert_parallel", 2, [{"name": "left", "words": words, "stop_at": 11, "leave": True}], tmp_path)
    launch("expert_parallel", split_settings, path)  # it may change on the way
    assert trace(RunFolder(path)) == trace(launched("expert_parallel")["run"])


def test_sharded_and_whole_checkpoints_end_with_the_same_bits(launched):
    whole, sharded = launched("fsdp2")["run"], launched("fsdp2_sharded")["run"]
    assert trace(whole) == trace(sharded)
    expected, found = (load_file(run.model_path / "model.safetensors") for run in (whole, sharded))
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("engine", ["fsdp2_sharded", "expert_parallel"])
def test_export_puts_the_parts_together(engine, launched, tmp_path, capsys):
    """No process group is needed; the last checkpoint's weights are the run's model."""
    run = launched(engine)["run"]
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
