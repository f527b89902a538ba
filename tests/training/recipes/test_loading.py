import argparse
import dataclasses
from typing import Any, Literal

import pytest

from deepseek_training.recipes.loading import (
    add_recipe_arguments,
    collect_overrides,
    describe_recipe,
    load_recipe,
    recipe_settings,
    setting,
)
from deepseek_training.recipes.pretrain_and_adapt import PretrainRecipe


@dataclasses.dataclass
class ToyRecipe:
    steps: int = setting(help="Optimizer steps.")
    learning_rate: float = setting(1e-3, help="Peak learning rate, above 0; 100% of it is used.")
    data: str = setting("books", help="Data.")
    kind: Literal["fast", "exact"] = setting("fast", help="Kind.")
    limit: int | None = setting(None, help="Limit, or null.")
    clip: bool = setting(True, help="Clip.")
    tasks: list[str] = setting(["a"], help="Tasks.")  # noqa: RUF009
    model: dict[str, Any] = setting({}, help="Model settings.")  # noqa: RUF009


def write(tmp_path, text):
    path = tmp_path / "toy.yaml"
    path.write_text(text)
    return path


def test_values_arrive_with_their_types(tmp_path):
    # 3e-4 is a string to YAML 1.1, which is what this guards against
    path = write(tmp_path, "learning_rate: 3e-4\nsteps: 7\nmodel: {a: 1, b: 2}\nlimit: 5\n")
    recipe = load_recipe(path, ToyRecipe)
    assert recipe.learning_rate == 3e-4 and isinstance(recipe.learning_rate, float)
    assert recipe.steps == 7 and recipe.limit == 5 and recipe.model == {"a": 1, "b": 2}
    assert recipe.data == "books" and recipe.tasks == ["a"]


def test_settings_round_trip(tmp_path):
    recipe = load_recipe(write(tmp_path, "steps: 7\n"), ToyRecipe, {"tasks": ["x", "y"]})
    import yaml

    again = load_recipe(write(tmp_path, yaml.safe_dump(recipe_settings(recipe))), ToyRecipe)
    assert again == recipe


@pytest.mark.parametrize(
    "overrides",
    [
        ["--learning-rate", "0.5", "--model.b", "3", "--model.c=x", "--limit", "null"],
        {"learning_rate": 0.5, "model": {"b": 3, "c": "x"}, "limit": None},
    ],
)
def test_overrides_replace_and_mappings_merge(tmp_path, overrides):
    recipe = load_recipe(write(tmp_path, "steps: 7\nlimit: 4\nmodel: {a: 1, b: 2}\n"), ToyRecipe, overrides)
    assert recipe.learning_rate == 0.5 and recipe.limit is None
    assert recipe.model == {"a": 1, "b": 3, "c": "x"}


def test_command_line_options_reach_the_recipe(tmp_path):
    parser = argparse.ArgumentParser()
    add_recipe_arguments(parser, ToyRecipe)
    args = parser.parse_args(["r", "--learning-rate", "1e-2", "--learning_rate", "2e-2", "--model", "{z: 1}"])
    overrides = collect_overrides(args)
    recipe = load_recipe(write(tmp_path, "steps: 7\nmodel: {a: 1}\n"), ToyRecipe, overrides)
    assert recipe.learning_rate == 0.02 and recipe.model == {"a": 1, "z": 1}


def test_help_prints_every_explanation_and_default():
    parser = argparse.ArgumentParser(prog="x")
    add_recipe_arguments(parser, ToyRecipe)
    text = " ".join(parser.format_help().split())
    for name, default, explanation in describe_recipe(ToyRecipe):
        assert f"--{name.replace('_', '-')}" in text and explanation in text and f"(default: {default})" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 7\nlearnin_rate: 1\n", "unknown setting 'learnin_rate'; did you mean learning_rate?"),
        ("steps: seven\n", "steps: got 'seven', expected a whole number"),
        ("steps: true\n", "steps: got True, expected a whole number"),
        ("steps: 7.5\n", "steps: got 7.5, expected a whole number"),
        ("steps: 7\nlearning_rate: true\n", "learning_rate: got True, expected a number"),
        ("steps: 7\nclip: 1\n", "clip: got 1, expected true or false"),
        ("steps: 7\nkind: exactt\n", "did you mean exact?"),
        ("steps: 7\ntasks: mmlu\n", "tasks: got 'mmlu', expected a list"),
        ("steps: 7\ntasks: [1]\n", "tasks: got 1, expected text"),
        ("steps: 7\nmodel: 3\n", "model: got 3, expected a mapping"),
        ("data: books\n", "setting 'steps' is missing"),
        ("steps: [1\n", "is not YAML"),
        ("just words\n", "holds no settings"),
    ],
)
def test_bad_recipes_fail_in_one_line(tmp_path, text, message):
    with pytest.raises(ValueError) as error:
        load_recipe(write(tmp_path, text), ToyRecipe)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_binary_recipe_is_refused(tmp_path):
    (tmp_path / "toy.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not a text file"):
        load_recipe(tmp_path / "toy.yaml", ToyRecipe)


@pytest.mark.parametrize(("words", "message"), [(["seed"], "is not a setting"), (["--seed"], "has no value")])
def test_bad_overrides_fail(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, "steps: 7\n"), ToyRecipe, words)


def test_unknown_recipe_names_the_nearest_one():
    with pytest.raises(FileNotFoundError, match="did you mean pretrain-demo"):
        load_recipe("pretrain-dmo", ToyRecipe)


@pytest.mark.parametrize("words", [["--model", "runs/mine/model"], ["--model", "5"]])
def test_a_model_to_train_on_is_pointed_to_adapt(words):
    with pytest.raises(ValueError, match=r"expected a mapping; pretrain begins from scratch; .* deepseek-moe adapt"):
        load_recipe("pretrain-debug", PretrainRecipe, words)
