"""The recipes between the demo's and the article's: their counts, and the fit of their rates and batches."""

import dataclasses

import pytest
import torch
from pretraining_choices import WIDE, recipe_of

from deepseek_cli.main import main
from deepseek_training.launch.plan import ModelSize, describe_compute
from deepseek_training.launch.step_time import MOST_TOKENS_ON_A_CPU, timed_rows
from deepseek_training.recipes.loading import load_recipe
from deepseek_training.recipes.pretrain_and_adapt import PretrainRecipe
from modeling_deepseek import DeepseekConfig
from modeling_deepseek.parameter_count import count_parameters

# Recipe, parameters, and how many such batches (of one device) make a step at the size the fit is for.
SIZES = {
    "pretrain-20m": (20e6, 1),
    "pretrain-100m": (100e6, 1),
    "pretrain-1b": (1e9, 1),
    "pretrain-154b": (154e9, 1024),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_recipe_is_as_large_as_it_says_and_trains_as_published(name):
    recipe, (parameters, num_devices) = load_recipe(name, PretrainRecipe), SIZES[name]
    settings = {"vocab_size": recipe.vocab_size, **recipe.model}
    config = DeepseekConfig.from_preset(recipe.preset, **settings)
    count = count_parameters(config)
    assert count.total == pytest.approx(parameters, rel=0.08)
    assert recipe.sequence_length <= config.max_position_embeddings
    batch = recipe.batch_size * recipe.gradient_accumulation_steps * recipe.sequence_length * num_devices
    embedding = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    flops = 6 * (count.active - embedding) * batch * recipe.max_steps
    # DeepSeek LLM, arXiv 2401.02954: the near-optimal learning rate and batch of a compute budget.
    assert batch == pytest.approx(0.2920 * flops**0.3271, rel=0.1)
    assert recipe.learning_rate == pytest.approx(0.3118 * flops**-0.1250, rel=0.25)


def test_the_wide_demo_is_the_variant_that_was_measured():
    demo, wide = (load_recipe(name, PretrainRecipe) for name in ("pretrain-demo", "pretrain-demo-wide"))
    steps = {name: getattr(wide, name) for name in ("max_steps", "save_steps", "sample_steps")}
    assert dataclasses.replace(recipe_of(demo, WIDE), **steps) == wide


def test_the_compute_of_a_training_in_words():
    whole = ModelSize(total=1000, active=250, trained=1000, num_bytes=4000)
    assert describe_compute(whole, 1e6) == "1 M tokens, about 1.5e+09 FLOPs"
    adapter = ModelSize(total=1000, active=250, trained=10, num_bytes=4000)
    assert describe_compute(adapter, 1e6) == "1 M tokens, about 1e+09 FLOPs"
    large = ModelSize(total=10**9, active=25 * 10**7, trained=10**9, num_bytes=4 * 10**9)
    assert describe_compute(large, 2e10).endswith("FLOPs: 21 h on one H100 at 40% of its bf16 peak")


def test_a_cpu_times_few_tokens():
    assert timed_rows(8, 256, torch.device("cpu")) == 8
    assert timed_rows(56, 1024, torch.device("cpu")) * 1024 == MOST_TOKENS_ON_A_CPU
    assert timed_rows(4, 4096, torch.device("cpu")) == 1
    assert timed_rows(56, 1024, torch.device("cuda")) == 56


def test_a_launch_file_of_an_engine_that_the_optimizer_does_not_know_is_refused(tmp_path, capsys):
    command = ["launch", "pretrain-demo", "--on", "slurm", "--engine", "zero3", "--output", str(tmp_path / "run")]
    assert main(command) == 2
    assert "optimizer: got muon with --engine zero3, expected adamw" in capsys.readouterr().err
    assert main([*command, "--optimizer", "adamw"]) == 0
