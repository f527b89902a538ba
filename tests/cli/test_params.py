"""`params`: presets with settings, recipes, run folders, checkpoints of any family."""

import pytest
from transformers import MixtralConfig

from deepseek_cli.main import main
from deepseek_records.run_folder import RunFolder
from modeling_deepseek import DeepseekConfig


def total(capsys, *words):
    assert main(["params", *words]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("total")]
    return int(line.split()[1].replace(",", ""))


def test_a_preset_with_settings(capsys):
    plain = total(capsys, "nano")
    assert total(capsys, "nano", "--n-routed-experts", "64", "--moe_intermediate_size=8") != plain
    assert total(capsys, "nano", "--vocab-size", "4096") == plain + (4096 - 2048) * 128


def test_a_recipe_its_file_and_its_run_count_the_same(capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("preset: debug\nmodel: {num_hidden_layers: 2}\nvocab_size: 300\n"
                                        "max_steps: 1\nlearning_rate: 0.1\n")  # fmt: skip
    counted = total(capsys, str(tmp_path / "mine.yaml"))
    assert counted == total(capsys, "debug", "--num-hidden-layers", "2", "--vocab-size", "300")
    assert total(capsys, str(tmp_path / "mine.yaml"), "--num-hidden-layers", "3", "--vocab-size", "400") > counted
    settings = {"preset": "debug", "model": {"num_hidden_layers": 2}, "vocab_size": 300, "max_steps": 1}
    run = RunFolder.create(tmp_path / "runs" / "pretrain", {**settings, "learning_rate": 0.1}, command="pretrain")
    assert total(capsys, str(run.path)) == counted
    DeepseekConfig.from_preset("debug", num_hidden_layers=2, vocab_size=300).save_pretrained(run.model_path)
    assert total(capsys, str(run.path)) == total(capsys, str(run.model_path)) == counted


def test_another_family(capsys, tmp_path):
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    MixtralConfig(hidden_size=16, intermediate_size=24, vocab_size=40, **heads).save_pretrained(tmp_path)
    assert main(["params", str(tmp_path)]) == 0
    assert "active per token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nano", "--num-expert-per-tok", "4"], "did you mean num_experts_per_tok?"),
        (["pretrain-debug", "--n-routed-expert", "4"], "did you mean n_routed_experts?"),
        (["nanoo"], "expected a preset"),
        (["nano", "--vocab-size"], "--vocab-size has no value"),
        (["nano", "--experts-per-token", "99"], "--experts-per-token: got 99"),
    ],
)
def test_bad_input_is_one_line(capsys, words, message):
    assert main(["params", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
