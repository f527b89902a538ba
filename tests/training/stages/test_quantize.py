"""The command that quantizes: what it writes, that other commands take it, and what it refuses."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from deepseek_cli.main import main
from deepseek_records.loading import load_model
from deepseek_records.run_folder import RunFolder
from deepseek_training.data.texts import load_texts
from deepseek_training.data.tokenizer import train_tokenizer
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

SMALL = ["--calibration-tokens", "256", "--sequence-length", "32", "--eval-bytes", "1000"]


@pytest.fixture(scope="module")
def original(tiny_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("original")
    tokenizer = train_tokenizer(load_texts(str(tiny_data)), 300)
    torch.manual_seed(0)
    config = DeepseekConfig.from_preset("debug", vocab_size=len(tokenizer))
    DeepseekForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def quantize(original, tiny_data, output, *words):
    return main(["quantize", str(original), str(output), "--data", str(tiny_data), *SMALL, *words])


@pytest.fixture(scope="module")
def run(original, tiny_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "int4"
    assert quantize(original, tiny_data, path, "--group", "16") == 0
    return path


def test_the_result_is_a_run_with_what_it_cost(run, original):
    summary = RunFolder(run).summary
    assert summary.stage == "quantize" and summary.base_model == str(original)
    before, after = summary.results
    details = summary.details
    assert after.value - before.value == pytest.approx(details["bits_per_byte_difference"], abs=1e-9)
    assert details["kl_divergence"] > 0 and details["bits_per_byte_difference_stderr"] > 0
    assert details["expert_bytes_per_weight"] == 0.5 + 4 / 16  # fp32 scales, one for 16 weights
    assert len(details["layers"]) == 2 and all(layer["num_tokens"] == 256 for layer in details["layers"])
    assert summary.checks[0].passed


def test_the_weights_on_disk_are_what_was_measured(run, original):
    model = load_model(run)
    assert model.model.layers[1].mlp.experts.four_bit.down_codes.dtype == torch.int32
    ids = torch.arange(24)[None]
    with torch.no_grad():
        moved = (model(ids).logits - load_model(original)(ids).logits).abs().max()
    assert 0 < moved < 0.1
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_generate_evaluate_and_card_take_it(run, tiny_data, tmp_path, capsys):
    assert main(["generate", str(run), "--prompt", "the", "--max-new-tokens", "4"]) == 0
    words = [
        "--tasks",
        "bits_per_byte",
        "--data",
        str(tiny_data),
        "--limit",
        "2",
        "--output",
        str(tmp_path / "scores"),
    ]
    assert main(["evaluate", str(run), *words]) == 0
    assert main(["card", str(run), "--output", str(tmp_path / "card")]) == 0
    card = (tmp_path / "card" / "README.md").read_text()
    assert "its routed experts are in 4 bits, by AWQ" in card
    assert "load_model(" in card and "pip install compressed-tensors" in card


BAD = {
    "group": (
        ["--group", "48"],
        "group_size: got 48, expected a divisor of the experts' 48 and 64 inputs, such as 16",
    ),
    "small group": (["--group", "4"], "group_size: got 4, expected at least 8"),
    "bits": (["--bits", "3"], "bits: got 3, expected 4"),
    "format": (["--format", "awq"], "format"),
    "scales": (["--scales", "big"], "scales"),
    "too few tokens": (["--group", "16", "--calibration-tokens", "3"], "calibration_tokens: got 3, expected at least"),
    "too little text": (["--group", "16", "--calibration-tokens", "9000000"], "calibration_tokens: got data of"),
    "no such data": (["--group", "16", "--data", "no/such/file.txt"], "no/such/file.txt"),
    "too long blocks": (["--group", "16", "--sequence-length", "4096"], "sequence_length"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name, original, tiny_data, tmp_path, capsys):
    words, message = BAD[name]
    assert quantize(original, tiny_data, tmp_path / "out", *words) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_model_and_an_occupied_folder_are_refused(run, original, tiny_data, tmp_path, capsys):
    assert quantize(run, tiny_data, tmp_path / "out", "--group", "16") == 2
    told = capsys.readouterr().err
    assert "quantized already (compressed-tensors), expected ordinary weights" in told and told.count("\n") == 1
    assert quantize(original, tiny_data, run, "--group", "8") == 2
    assert "int4" in capsys.readouterr().err and load_model(run) is not None


def test_a_dry_run_says_what_and_writes_nothing(original, tiny_data, tmp_path, capsys):
    assert quantize(original, tiny_data, tmp_path / "out", "--group", "16", "--dry-run") == 0
    told = capsys.readouterr().out
    assert "routed experts of 2 layers in 4 bits, groups of 16" in told and not (tmp_path / "out").exists()


def test_what_would_change_4_bit_experts_is_refused(run, original, tmp_path, capsys):
    assert main(["shrink", str(run), str(tmp_path / "cut"), "--set", "n_routed_experts=4"]) == 2
    assert "expected ordinary weights to cut" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "v3")]) == 2
    model = load_model(original)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=targets))
    adapter.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(run)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 2
    assert "merge it into the model they were quantized from" in capsys.readouterr().err
    assert not (tmp_path / "cut").exists() and not (tmp_path / "merged").exists()
