"""align and grpo in two processes under ZeRO-3: the figures of two processes that hold all of it, exact resume.

Which completions are drawn depends on the number of processes, so one process is no witness here; that plain data
parallelism agrees with it, where nothing is drawn, is held by `ppo/test_processes.py`.
"""

import pytest
import torch
from process_jobs import NEEDS_DEEPSPEED, run_jobs
from safetensors.torch import load_file

from deepseek_records.run_folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), NEEDS_DEEPSPEED]

CLOCKED = {"eps", "step_time", "peak_memory_gib", "num_tokens"}
SETTINGS = {
    # a checkpoint comes every ten updates
    "align": ["--num-updates", "12", "--learning-rate", "0.001"],
    "grpo": ["--num-updates", "4", "--learning-rate", "0.001", "--save-steps", "2", "--bias-update-speed", "0.01"],
}
FOLDERS = {"align": ("model", "value_model", "reference"), "grpo": ("model",)}


def words(stage, policy, output):
    common = ["--max-prompt-tokens", "400", "--batch-size", "4", "--num-eval-prompts", "9", "--report-to", "[]"]
    return [stage, f"{stage}-debug", "--model", str(policy), "--output", str(output), *common, *SETTINGS[stage]]


@pytest.fixture(scope="module")
def whole(policy_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    jobs = [{"name": stage, "words": words(stage, policy_path, folder / stage)} for stage in SETTINGS]
    run_jobs("torchrun", 2, jobs, folder)
    return folder


@pytest.fixture(scope="module")
def split(policy_path, tmp_path_factory):
    """Each stage left alone, and stopped in its last update and begun again."""
    folder, jobs = tmp_path_factory.mktemp("split"), []
    for stage, last in (("align", 12), ("grpo", 4)):
        again = words(stage, policy_path, folder / f"{stage}-again")
        jobs.append({"name": stage, "words": words(stage, policy_path, folder / stage)})
        jobs.append({"name": f"{stage}-stopped", "words": again, "stop_at": last})
        jobs.append({"name": f"{stage}-again", "words": again})
    run_jobs("zero3", 2, jobs, folder)
    return folder


def is_timed(name):
    return name in CLOCKED or name.startswith("time/") or "per_second" in name


def trace(path):
    """The run's figures, but for those of the clock."""
    return [{k: v for k, v in row.items() if not is_timed(k)} for row in RunFolder(path).metrics]


def is_number(value):
    return isinstance(value, float | int)


@pytest.mark.parametrize("stage", SETTINGS)
def test_split_policies_learn_like_whole_ones(stage, whole, split):
    expected, found = trace(whole / stage), trace(split / stage)
    assert len(expected) == len(found)
    for one, two in zip(expected, found, strict=True):
        assert {k: v for k, v in one.items() if is_number(v)} == pytest.approx(
            {k: v for k, v in two.items() if is_number(v)}, rel=2e-4, abs=2e-5
        )
    for name in FOLDERS[stage]:
        one, two = (load_file(folder / stage / name / "model.safetensors") for folder in (whole, split))
        assert one.keys() == two.keys()
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=0, atol=1e-4, msg=lambda m, n=key: f"{n} {m}")
    moved, start = (
        load_file(split / stage / "model" / "model.safetensors"),
        load_file(split / "align" / "reference" / "model.safetensors"),
    )
    assert any((moved[key] - start[key]).abs().max() > 1e-3 for key in start)


@pytest.mark.parametrize("stage", SETTINGS)
def test_stopped_they_go_on_to_the_same_bits(stage, split):
    assert trace(split / f"{stage}-again") == trace(split / stage)
    for name in FOLDERS[stage]:
        one, two = (load_file(split / run / name / "model.safetensors") for run in (stage, f"{stage}-again"))
        assert one.keys() == two.keys() and all(torch.equal(two[key], value) for key, value in one.items())
