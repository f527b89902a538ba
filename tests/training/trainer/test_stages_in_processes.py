"""adapt, sft, distill and dpo in two processes that divide the model: the figures of one process, exact resume.

Each way of dividing is started once and runs every stage, each also stopped in its last step and run again.
"""

import json

import pytest
import torch
from process_jobs import NEEDS_DEEPSPEED, run_jobs
from safetensors.torch import load_file

from deepseek_records.loading import load_model, load_tokenizer
from deepseek_records.run_folder import RunFolder
from deepseek_training.data.texts import load_texts
from modeling_deepseek import DeepseekForCausalLM

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Of the clock and the machine, and a sum of TRL that begins again with each start.
CLOCKED = {"tokens_per_second", "peak_memory_gib", "mfu", "num_tokens"}
CLOCKED |= {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_num_tokens"}
SETTINGS = ["--max-steps", "4", "--learning-rate", "0.003", "--logging-steps", "2", "--save-steps", "2"]
SETTINGS += ["--report-to", "[]", "--max-grad-norm", "0.5"]
WHOLE = ("adapt", "sft", "distill")
STAGES = {
    "fsdp2_sharded": (*WHOLE, "adapt-lora"),
    "expert_parallel": WHOLE,
    "zero3": (*WHOLE, "dpo"),
}
CASES = [
    pytest.param(engine, stage, marks=NEEDS_DEEPSPEED if engine == "zero3" else ())
    for engine, stages in STAGES.items()
    for stage in stages
]


@pytest.fixture(scope="module")
def files(policy_path, tmp_path_factory):
    """A model with a head of its own, and two small sets of text."""
    folder = tmp_path_factory.mktemp("files")
    model = load_model(policy_path)
    model.config.tie_word_embeddings = False
    untied = DeepseekForCausalLM(model.config)
    untied.load_state_dict(model.state_dict())
    untied.save_pretrained(folder / "model")
    load_tokenizer(policy_path).save_pretrained(folder / "model")
    for name in ("books", "medicine"):
        texts = [text[:2000] for text in load_texts(name)[:30]]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pairs = [
        {"prompt": f"What is {i} and {i}?", "chosen": f"It is {2 * i}, sir.", "rejected": f"{2 * i}!"}
        for i in range(40)
    ]
    splits = ["train" if i < 36 else "validation" for i in range(40)]
    rows = [json.dumps({**pair, "split": split}) + "\n" for pair, split in zip(pairs, splits, strict=True)]
    (folder / "pairs.jsonl").write_text("".join(rows))
    return folder


def words(stage, files, output, more):
    """A command of eight rows per step, and what differs between one process and two."""
    model, text = str(files / "model"), ["--sequence-length", "32", "--eval-bytes", "2000"]
    command = {
        "adapt": ["--model", model, "--data", str(files / "medicine.jsonl"), *text, "--bias-update-speed", "0.01"],
        "sft": ["--model", model, "--bias-update-speed", "0.01", "--num-eval-conversations", "4"],
        "distill": ["--teacher", model, "--data", str(files / "books.jsonl"), "--calibration-tokens", "256", *text],
        "dpo": ["--model", model, "--data", str(files / "pairs.jsonl"), "--bias-update-speed", "0.01"],
    }
    name, _, lora = stage.partition("-")
    command["adapt"] += ["--general-data", str(files / "books.jsonl"), "--replay-share", "0.1"]
    adapter = ["--lora-rank", "4"] if lora else []
    return [name, f"{name}-debug", "--output", str(output), *command[name], *SETTINGS, *adapter, *more]


@pytest.fixture(scope="module")
def alone(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    spread = ["--batch-size", "8"]
    jobs = [{"name": one, "words": words(one, files, folder / one, spread)} for one in (*WHOLE, "adapt-lora", "dpo")]
    run_jobs(None, 1, jobs, folder)
    return folder


@pytest.fixture(scope="module")
def launched(files, tmp_path_factory):
    """The runs of two processes under an engine, two rows each, two passes per step; made once."""
    made = {}

    def launch(engine):
        if engine not in made:
            folder = made[engine] = tmp_path_factory.mktemp(engine)
            spread = ["--batch-size", "2", "--gradient-accumulation-steps", "2"]
            spread += ["--expert-parallel-size", "2"] if engine == "expert_parallel" else []
            jobs = []
            for stage in STAGES[engine]:
                jobs.append({"name": stage, "words": words(stage, files, folder / stage, spread)})
                again = words(stage, files, folder / f"{stage}-again", spread)
                jobs.append({"name": f"{stage}-stopped", "words": again, "stop_at": 4})
                jobs.append({"name": f"{stage}-again", "words": again})
            run_jobs(engine, 2, jobs, folder)
        return made[engine]

    return launch


def trace(path):
    return [{key: value for key, value in row.items() if key not in CLOCKED} for row in RunFolder(path).metrics]


@pytest.mark.parametrize(("engine", "stage"), CASES)
def test_two_processes_end_where_one_does(engine, stage, launched, alone):
    one, two = RunFolder(alone / stage), RunFolder(launched(engine) / stage)
    assert [row["step"] for row in two.metrics] == [row["step"] for row in one.metrics]
    bits = {key for row in one.metrics for key in row if key.endswith("bits_per_byte")}
    for key in ("loss", "grad_norm", "router_bias_range", *sorted(bits)):
        expected, found = ([row[key] for row in run.metrics if key in row] for run in (one, two))
        assert found == pytest.approx(expected, rel=2e-4) and found, key
    expected, found = (load_file(run.model_path / "model.safetensors") for run in (one, two))
    assert expected.keys() == found.keys() - ({"lm_head.weight"} - expected.keys())
    for name, value in expected.items():
        close = 1e-7 if name.endswith("e_score_correction_bias") else 2e-3
        torch.testing.assert_close(found[name], value, rtol=0, atol=close, msg=lambda m, n=name: f"{n} {m}")


@pytest.mark.parametrize(("engine", "stage"), CASES)
def test_stopped_they_go_on_to_the_same_bits(engine, stage, launched):
    whole, again = (launched(engine) / name for name in (stage, f"{stage}-again"))
    assert trace(again) == trace(whole)
    for file in ("model/model.safetensors", *(["adapter/adapter_model.safetensors"] if "lora" in stage else [])):
        expected, found = (load_file(run / file) for run in (whole, again))
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
