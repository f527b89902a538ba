"""The command that cuts: what it writes, that the result is a model like any other, and what it refuses."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deepseek_cli.main import main
from deepseek_records.loading import load_model
from deepseek_records.run_folder import RunFolder
from deepseek_training.data.texts import load_texts
from deepseek_training.data.tokenizer import train_tokenizer
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

SMALL = ["--calibration-tokens", "256", "--sequence-length", "32", "--eval-bytes", "1000"]


@pytest.fixture(scope="module")
def teacher(tiny_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher")
    tokenizer = train_tokenizer(load_texts(str(tiny_data)), 300)
    torch.manual_seed(0)
    config = DeepseekConfig.from_preset("debug", vocab_size=len(tokenizer), num_nextn_predict_layers=1)
    config.mtp_loss_coef = 0.3
    DeepseekForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def shrink(teacher, tiny_data, output, *words):
    return main(["shrink", str(teacher), str(output), *words, "--data", str(tiny_data), *SMALL])


def test_the_result_is_a_run_and_a_model_like_any_other(teacher, tiny_data, tmp_path, capsys):
    words = ["--set", "n_routed_experts=4", "hidden_size=48", "--set", "kv_lora_rank=24"]
    assert shrink(teacher, tiny_data, tmp_path / "half", *words, "--dry-run") == 0
    told = capsys.readouterr().out
    assert "hidden_size 64 -> 48, n_routed_experts 8 -> 4, kv_lora_rank 32 -> 24" in told
    assert not (tmp_path / "half").exists()
    assert shrink(teacher, tiny_data, tmp_path / "half", *words) == 0
    assert "bits per byte, not healed" in capsys.readouterr().out
    summary = RunFolder(tmp_path / "half").summary
    assert [row.when for row in summary.results] == ["before", "after"]
    assert summary.base_model == str(teacher) and [len(row) for row in summary.details["experts_kept"]] == [4, 4]
    student = load_model(tmp_path / "half")
    assert student.num_parameters() == summary.num_parameters
    saved = load_file(tmp_path / "half" / "model" / "model.safetensors")
    assert not any(".layers.3." in name or "enorm" in name for name in saved), "no tensor of the teacher's"
    assert json.loads((tmp_path / "half" / "model" / "config.json").read_text())["num_nextn_predict_layers"] == 0


@pytest.mark.slow
def test_the_result_loads_without_this_package_and_exports(teacher, tiny_data, tmp_path):
    words = ["--set", "n_routed_experts=4", "hidden_size=48", "min_experts_per_tok=null"]
    assert shrink(teacher, tiny_data, tmp_path / "half", *words) == 0
    student = load_model(tmp_path / "half")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A;"
        f"m = A.from_pretrained({str(tmp_path / 'half' / 'model')!r}, trust_remote_code=True);"
        "assert 'modeling_deepseek' not in sys.modules; print(m(torch.arange(8)[None]).logits.double().sum().item())"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    with torch.no_grad():
        expected = student(torch.arange(8)[None]).logits.double().sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-5)
    assert main(["export", str(tmp_path / "half"), str(tmp_path / "v3")]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "v3")
    assert main(["export", str(tmp_path / "half"), str(tmp_path / "half.gguf"), "--to", "gguf"]) == 0
    assert main(["card", str(tmp_path / "half")]) == 0
    card = next((tmp_path / "half").rglob("README.md")).read_text()
    assert "It was cut out of a larger model." in card and "Cut out of a larger model" in card


def test_nothing_to_cut_gives_the_same_files(teacher, tiny_data, tmp_path):
    """The prediction layer that the checkpoint carries too, bit for bit."""
    assert shrink(teacher, tiny_data, tmp_path / "same", "--set", "n_routed_experts=8") == 0
    before = load_file(teacher / "model.safetensors")
    after = load_file(tmp_path / "same" / "model" / "model.safetensors")
    assert before.keys() == after.keys() and any(".layers.3." in name for name in before)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


BAD: dict[str, tuple[list[str], str]] = {
    "not a slice": (
        ["--set", "v_head_dim=16"],
        "not a slice of the teacher: v_head_dim: got 16, expected the teacher's",
    ),
    "larger": (["--set", "hidden_size=128"], "hidden_size: got 128, expected at most the teacher's 64"),
    "two obstacles": (["--set", "vocab_size=9", "q_lora_rank=4"], "q_lora_rank: got 4, expected a number like"),
    "no such setting": (["--set", "experts=4"], "experts: no such setting of deepseek_moe"),
    "nothing to cut": ([], "--set: got nothing, expected at least one KEY=VALUE"),
    "no value": (["--set", "n_routed_experts"], "--set: got 'n_routed_experts', expected KEY=VALUE"),
    "of no sense": (["--set", "n_routed_experts=none"], "n_routed_experts"),
    "too few tokens": (["--set", "n_routed_experts=4", "--calibration-tokens", "7"], "calibration_tokens: got 7"),
    "too little text": (
        ["--set", "n_routed_experts=4", "--calibration-tokens", "9000000"],
        "calibration_tokens: got data of",
    ),
    "too long blocks": (["--set", "n_routed_experts=4", "--sequence-length", "4096"], "sequence_length"),
    "no such data": (["--set", "n_routed_experts=4", "--data", "no/such/file.txt"], "no/such/file.txt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name, teacher, tiny_data, tmp_path, capsys):
    words, message = BAD[name]
    assert main(["shrink", str(teacher), str(tmp_path / "out"), "--data", str(tiny_data), *SMALL, *words]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_folder_is_left_alone(teacher, tiny_data, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    assert shrink(teacher, tiny_data, tmp_path, "--set", "n_routed_experts=4") == 2
    assert "thesis.txt" in [path.name for path in tmp_path.iterdir()]
    assert "holds no run of ours" in capsys.readouterr().err
