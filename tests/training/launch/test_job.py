"""The files that start a stage elsewhere: each is what its reader takes, and bad input never reaches a node."""

import ast
import subprocess

import kubernetes_validate
import pytest
import yaml

from deepseek_cli.main import main
from deepseek_training.launch.job import ENGINES

PLACES = {
    "local": ["--gpus-per-node", "2"],
    "slurm": ["--nodes", "4", "--partition", "big"],
    "kubernetes": ["--nodes", "4", "--image", "me/moe:1", "--claim", "runs"],
    "ray": ["--nodes", "2"],
}


def render(capsys, *words, recipe="pretrain-debug"):
    assert main(["launch", recipe, "--output", "/shared/a run/out", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("place", ["local", "slurm"])
def test_shell_files_parse_and_quote(place, engine, capsys):
    more = ["--expert-parallel-size", "2", "--save-steps", "0"] if engine == "expert_parallel" else []
    text = render(capsys, "--on", place, *PLACES[place], "--engine", engine, *more)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert "/shared/a run/out" in text and "--dry-run || exit" in text
    assert ("torch.distributed.run" in text) == (engine == "ddp")
    assert (f"/{engine}.yaml" in text) == (engine != "ddp")


def test_slurm_asks_for_what_was_given(capsys):
    text = render(capsys, "--on", "slurm", "--nodes", "64", "--time", "2-00:00:00", "--restarts", "3")
    options = dict(
        line[8:].split("=", 1) for line in text.splitlines() if line.startswith("#SBATCH --") and "=" in line
    )
    assert options["--nodes"] == "64" and options["--gpus-per-node"] == "8" and options["--time"] == "2-00:00:00"
    assert "#SBATCH --requeue" in text and "< 3" in text and "--nnodes 64 --nproc-per-node 8" in text


def test_the_jobset_holds_a_valid_job(capsys):
    jobset = yaml.safe_load(render(capsys, "--on", "kubernetes", *PLACES["kubernetes"]))
    assert jobset["kind"] == "JobSet" and set(jobset["spec"]) == {"failurePolicy", "network", "replicatedJobs"}
    (part,) = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": part["template"]["spec"]}
    kubernetes_validate.validate(job, "1.30", strict=True)
    pod = job["spec"]["template"]["spec"]
    subprocess.run(["bash", "-n"], input=pod["containers"][0]["args"][0], text=True, check=True)
    assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == "/shared/a run"
    with pytest.raises(kubernetes_validate.ValidationError):
        job["spec"]["parallelism"] = "four"
        kubernetes_validate.validate(job, "1.30", strict=True)


def test_the_ray_file_is_a_program(capsys):
    tree = ast.parse(render(capsys, "--on", "ray", *PLACES["ray"]))
    assert "TorchTrainer" in ast.dump(tree)


def test_a_files_stage_is_found(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("max_steps: 3\nlearning_rate: 0.001\nmodel: runs/first/model\n")
    assert main(["launch", str(path), "--output", "out"]) == 2
    assert "--stage: got a recipe that" in capsys.readouterr().err
    assert main(["launch", str(path), "--stage", "adapt", "--output", "out"]) == 0
    assert f"adapt {path}" in capsys.readouterr().out
    path.write_text("preset: debug\nvocab_size: 300\nmax_steps: 3\nlearning_rate: 0.001\n")
    assert main(["launch", str(path), "--output", "out"]) == 0
    assert f"pretrain {path}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such"], "no-such"),
        (["pretrain-debug", "--nodes", "0", "--on", "slurm"], "--nodes: got 0, expected at least 1"),
        (["pretrain-debug", "--nodes", "2"], "--nodes: got 2, expected 1 with --on local"),
        (["pretrain-debug", "--on", "kubernetes"], "--image and --claim: got none, expected both"),
        (["pretrain-debug", "--on", "slurm", "--time", "soon"], "--time: got 'soon', expected [DAYS-]HOURS"),
        (["pretrain-debug", "--on", "slurm", "--name", "A b"], "--name: got 'A b', expected lower-case letters"),
        (["pretrain-debug", "--seeed", "3"], "unknown setting 'seeed'"),
        (["pretrain-debug", "--cpu"], "--processes-per-node: got one of it and --cpu, expected both or neither"),
        (["pretrain-debug", "--engine", "expert_parallel"], "--engine: got expert_parallel, expected"),
        (["align-debug", "--engine", "fsdp2"], "--engine: got fsdp2, expected ddp or zero3 for align"),
        (["dpo-debug", "--engine", "fsdp2_sharded"], "--engine: got fsdp2_sharded, expected ddp or zero3 for dpo"),
        (
            ["grpo-debug", "--engine", "zero3", "--lora-rank", "4"],
            "lora_rank: got 4 with --engine zero3, expected 0 for grpo",
        ),
        (
            ["pretrain-debug", "--save-in-background", "true"],
            "save_in_background: got True with --engine",
        ),
        (["pretrain-debug", "--on", "ray", "--engine", "zero3"], "--engine: got zero3, expected ddp with --on ray"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys):
    assert main(["launch", *words, "--output", "out"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
