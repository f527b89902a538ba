"""LoRA in `adapt` and `sft`: only the adapter trains, it resumes, and later commands take it as MODEL."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig

from deepseek_cli.main import main
from deepseek_records.loading import load_model
from deepseek_records.run_folder import RunFolder
from deepseek_training.data.texts import load_texts
from deepseek_training.recipes.sft import SftRecipe
from deepseek_training.trainer.lora import with_lora

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "mixtral": (MixtralConfig(vocab_size=400, num_key_value_heads=2, num_local_experts=4, **SMALL), "experts"),
    "llama": (LlamaConfig(vocab_size=400, **SMALL), "mlp.gate_proj"),
}


def sft_command(model, output, *more):
    small = ["--max-steps", "6", "--learning-rate", "0.01", "--logging-steps", "3", "--save-steps", "3"]
    return ["sft", "sft-debug", "--model", str(model), "--output", str(output), "--report-to", "[]", *small, *more]


@pytest.fixture(scope="module")
def taught(policy_path, tmp_path_factory):
    """A finished run of sft with LoRA and a bias that moves."""
    path = tmp_path_factory.mktemp("taught") / "run"
    assert main(sft_command(policy_path, path, "--lora-rank", "4", "--bias-update-speed", "0.01")) == 0
    return path


def test_only_the_adapter_and_the_routers_move(policy_path, taught):
    old, new = (load_file(path / "model.safetensors") for path in (policy_path, taught / "model"))
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert any("experts.0" in name for name in moved) and any("q_proj" in name for name in moved)
    assert any("e_score_correction_bias" in name for name in moved)
    assert all("mlp.experts" in n or "self_attn" in n or "mlp.gate." in n for n in moved)
    assert RunFolder(taught).summary.results[1].value < RunFolder(taught).summary.results[0].value
    assert (taught / "adapter" / "adapter_model.safetensors").stat().st_size < 400_000


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 40)[None]).logits


def test_the_adapter_is_the_model(taught, tmp_path, monkeypatch):
    whole = AutoModelForCausalLM.from_pretrained(taught / "model")
    monkeypatch.chdir(tmp_path)  # the base is found from anywhere
    for other in (load_model(taught / "adapter"), AutoPeftModelForCausalLM.from_pretrained(taught / "adapter")):
        torch.testing.assert_close(logits(other), logits(whole), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bits(policy_path, taught, tmp_path):
    shutil.copytree(taught, tmp_path / "cut")
    for name in ("model", "adapter"):
        shutil.rmtree(tmp_path / "cut" / name)
    (tmp_path / "cut" / "summary.json").unlink()
    assert main(sft_command(policy_path, tmp_path / "cut", "--lora-rank", "4", "--bias-update-speed", "0.01")) == 0
    one, other = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (taught, tmp_path / "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert RunFolder(tmp_path / "cut").summary.results == RunFolder(taught).summary.results


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("evaluate", "export", "adapt", "sft")]


@pytest.mark.parametrize("command", ["generate", "merge", "params", "align", *SLOW])
def test_the_adapter_is_model_of_every_command(taught, tmp_path, capsys, command):
    adapter, output = str(taught / "adapter"), str(tmp_path / "out")
    small = [
        "--report-to",
        "[]",
        "--max-steps",
        "2",
        "--warmup-steps",
        "0",
        "--logging-steps",
        "1",
        "--save-steps",
        "0",
    ]
    words = {
        "generate": [adapter, "--prompt", "a small", "--max-new-tokens", "2"],
        "evaluate": [adapter, "--tasks", "humaneval", "--limit", "1", "--max-new-tokens", "2", "--output", output],
        "export": [adapter, str(tmp_path / "model.gguf"), "--to", "gguf", "--fixed-experts", "2"],
        "merge": [adapter, output],
        "params": [adapter],
        "adapt": ["adapt-debug", "--model", adapter, "--output", output, "--sequence-length", "64", *small],
        "align": ["align-debug", "--model", adapter, "--output", output, "--dry-run"],
        "sft": ["sft-debug", "--model", adapter, "--output", output, "--dry-run"],
    }[command]
    assert main([command, *words]) == 0, capsys.readouterr().err
    if command == "merge":
        expected = AutoModelForCausalLM.from_pretrained(taught / "model").state_dict()
        found = AutoModelForCausalLM.from_pretrained(output).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert AutoTokenizer.from_pretrained(output).chat_template


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(policy_path, tmp_path, family):
    config, wanted = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    recipe = SftRecipe(model="somewhere", lora_rank=2, max_steps=1, learning_rate=0.1)
    adapted = with_lora(model, recipe)
    trained = [name for name, value in adapted.named_parameters() if value.requires_grad]
    assert any(wanted in name for name in trained) and any("q_proj" in name for name in trained)
    assert not any("lm_head" in name for name in trained)


@pytest.mark.slow
def test_adapt(policy_path, tmp_path):
    texts = {name: load_texts(name, "validation")[:40] for name in ("books", "medicine")}
    for name, rows in texts.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    command = [
        "adapt",
        "adapt-debug",
        "--model",
        str(policy_path),
        "--output",
        str(tmp_path / "run"),
        "--lora-rank",
        "2",
    ]
    command += ["--data", str(tmp_path / "medicine.jsonl"), "--general-data", str(tmp_path / "books.jsonl")]
    assert main([*command, "--report-to", "[]", "--sequence-length", "64"]) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora-rank", "-1"], "lora_rank: got -1"),
        (["--lora-alpha", "8"], "lora_alpha: got 8.0, expected null with lora_rank=0"),
        (["--lora-rank", "2", "--lora-targets", "[no_such_proj]"], "lora_targets: got ['no_such_proj']"),
    ],
)
def test_bad_settings_are_one_line(policy_path, tmp_path, capsys, more, message):
    assert main(sft_command(policy_path, tmp_path / "run", *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_what_merge_cannot_use(taught, policy_path, tmp_path, capsys):
    gone = shutil.copytree(taught / "adapter", tmp_path / "adapter")
    settings = json.loads((gone / "adapter_config.json").read_text())
    (gone / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "/nowhere/base"}))
    for words, message in (
        ([str(policy_path), str(tmp_path / "out")], "expected a folder with adapter_config.json"),
        ([str(taught / "adapter"), str(taught)], "expected an empty or absent folder"),
        ([str(gone), str(tmp_path / "out")], "of the base model /nowhere/base, which does not exist"),
    ):
        assert main(["merge", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert main(["merge", str(gone), str(tmp_path / "out"), "--base", str(policy_path)]) == 0
