"""The start-up block: what it counts is what the run does, a dry run writes nothing, and training is not disturbed."""

import re

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from deepseek_cli.main import main
from deepseek_records.run_folder import RunFolder
from deepseek_training.launch.plan import measure_size
from deepseek_training.recipes.loading import build_recipe
from deepseek_training.recipes.pretrain_and_adapt import PretrainRecipe
from deepseek_training.stages import pretrain as stage
from modeling_deepseek import DeepseekConfig
from modeling_deepseek.parameter_count import count_parameters


def rows(printed):
    """The block's rows by label."""
    return dict(re.findall(r"^  (\w[\w ]*?) {2,}(.*)$", printed, re.MULTILINE))


@pytest.fixture
def recipe_path(tiny_settings, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_settings))
    return str(tmp_path / "tiny.yaml")


@pytest.mark.slow
def test_what_it_says_is_what_the_run_does(recipe_path, tmp_path, capsys):
    command = ["pretrain", recipe_path, "--output", str(tmp_path / "run")]
    assert main([*command, "--dry-run"]) == 0
    said = rows(capsys.readouterr().out)
    assert not (tmp_path / "run").exists()
    assert main(command) == 0
    assert rows(capsys.readouterr().err).keys() == said.keys()
    summary = RunFolder(tmp_path / "run").summary
    assert said["model"].startswith(f"{summary.num_parameters / 1e3:.4g} k parameters")
    train, held_out = (use.num_rows for use in summary.data)
    assert said["data"] == f"tales: {train} to train on, {held_out} held out"
    assert said["steps"].startswith("12 of 4 x 32 = 128 tokens") and summary.num_training_tokens == 12 * 128
    assert "balancing bias 0.01" in said["on"] and "dropout 0.1" in said["on"] and "checkpoint steps 4" in said["on"]
    assert "bf16" in said["off"] and "trackers" in said["off"] and "multi-token prediction" in said["off"]
    assert main([*command, "--dry-run"]) == 2
    assert "holds a finished run" in capsys.readouterr().err


@pytest.mark.slow
def test_the_block_leaves_the_training_as_it_was(tiny_settings, tmp_path, monkeypatch):
    recipe = build_recipe({**tiny_settings, "max_steps": 4}, PretrainRecipe)
    with_block = stage.pretrain(recipe, tmp_path / "with")
    monkeypatch.setattr(stage, "plan_training", lambda *args, **kwargs: None)
    monkeypatch.setattr(stage, "announce", lambda *args, **kwargs: None)
    without = stage.pretrain(recipe, tmp_path / "without")
    assert with_block.results == without.results and with_block.samples == without.samples
    one, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / n / "model").state_dict() for n in ("with", "without")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        pytest.param(
            ["adapt", "adapt-debug", "--sequence-length", "32"],
            {"steps": "20 of 8 x 32", "blocks": "blocks of 32"},
            marks=pytest.mark.slow,
        ),
        (["sft", "sft-debug"], {"steps": "10 of 8 x 128", "blocks": "conversations"}),
        (["align", "align-debug"], {"steps": "2 updates of 8 prompts", "reward": "0.7 relevance, 0.2 safety"}),
        (["align", "align-debug", "--repetition-penalty", "5"], {"steps": "2 updates of 8 prompts"}),
        (["align", "align-debug", "--lora-rank", "2"], {"value model": "shares the policy's weights"}),
    ],
)
def test_a_dry_run_of_the_other_stages(policy_path, tmp_path, capsys, command, wanted):
    output = tmp_path / "run"
    assert main([*command, "--model", str(policy_path), "--output", str(output), "--dry-run"]) == 0
    printed = capsys.readouterr()
    said = rows(printed.out)
    assert all(text in said[label] for label, text in wanted.items()), said
    assert re.match(r"about \d+ (s|min) for", said["time"]) and "GiB" in said["memory"]
    assert printed.out.endswith("dry run: nothing was written\n") and not output.exists()
    assert "ExpertBalanceCallback" not in printed.err


def test_a_model_too_large_for_any_machine(tiny_data, tmp_path, capsys):
    command = ["pretrain", "pretrain-debug", "--data", str(tiny_data), "--tokenizer-data", "[]", "--vocab-size", "300"]
    command += ["--preset", "154b", "--model", "{vocab_size: 129280}", "--output", str(tmp_path / "run"), "--dry-run"]
    assert main(command) == 0
    said = rows(capsys.readouterr().out)
    assert said["model"] == "154.1 B parameters, at most 37.24 B (24%) active per token"
    assert "more than this machine has" in said["memory"] and "not estimated" in said["time"]


@pytest.mark.parametrize(
    ("config", "active"),
    [
        (MixtralConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                       num_key_value_heads=2, vocab_size=40, num_local_experts=4, num_experts_per_tok=1), 0.25),
        (LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=2, vocab_size=40), 1.0),
    ],
)  # fmt: skip
def test_the_size_of_any_family(config, active):
    model = AutoModelForCausalLM.from_config(config)
    size = measure_size(model)
    routed = sum(value.numel() for name, value in model.named_parameters() if ".experts." in name)
    assert size.total == size.trained == model.num_parameters()
    assert size.active == size.total - routed * (1 - active)


def test_the_size_of_ours_is_what_params_counts():
    for preset in ("debug", "nano"):
        config = DeepseekConfig.from_preset(preset, vocab_size=300)
        count = count_parameters(config)
        size = measure_size(AutoModelForCausalLM.from_config(config))
        assert (size.total, size.active) == (count.total, round(count.active))
