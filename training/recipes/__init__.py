"""Recipes: their dataclasses, their reader and the embedded YAML files."""
