from pathlib import Path

import pytest

from deepseek_training.recipes.loading import describe_recipe, list_recipes, load_recipe
from deepseek_training.recipes.write_docs import STAGES, recipes_page

PAGE = Path(__file__).parents[3] / "docs" / "recipes.md"


def test_the_page_is_what_the_settings_say():
    assert PAGE.read_text(encoding="utf-8") == recipes_page(), "run python -m deepseek_training.recipes.write_docs"


@pytest.mark.parametrize("name", list_recipes())
def test_every_embedded_recipe_loads(name):
    stage = name.split("-")[0]
    load_recipe(name, STAGES[stage])


def test_every_setting_is_explained():
    for recipe_class in STAGES.values():
        assert all(text.strip() for _, _, text in describe_recipe(recipe_class))
