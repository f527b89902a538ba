"""The sources of a mixture of texts, as a recipe's `data` lists them."""

import dataclasses
import math
from typing import Any

from deepseek_training.recipes.bounds import BoundedSettings
from deepseek_training.recipes.loading import build_recipe, setting


@dataclasses.dataclass(kw_only=True)
class TextSource(BoundedSettings):
    """One source of text to train on."""

    path: str = setting(help="Embedded name, file, folder, datasets directory or Hub id.")
    name: str | None = setting(None, help="What figures call it; null: the last part of the path.")
    weight: float | None = setting(
        None, help="Share of the training blocks, relative to the other sources; null for all: by their sizes."
    )
    column: str | None = setting(None, help="Column that holds the text; null: text.")
    encoding: str | None = setting(None, help="Encoding of its files; null: the recipe's.")
    languages: list[str] = setting([], help="ISO 639-1 codes of its languages, for cards.")  # noqa: RUF009
    license: str | None = setting(None, help="Its license, for cards; null: what is known of it.")
    validation: str | None = setting(
        None, help="Held-out text of its own, named like path; it must not overlap any training text."
    )
    validation_share: float | None = setting(
        None, help="Share of documents held out by a hash, in [0, 1); null: its column 'split', else one in ten."
    )

    def __post_init__(self) -> None:
        weight, share = self.weight, self.validation_share
        self.require("weight", weight is None or 0 <= weight < math.inf, "null or at least 0, and finite")
        self.require("validation_share", share is None or 0 <= share < 1, "null or in [0, 1)")
        self.require("validation_share", share is None or self.validation is None, "null with validation")


def text_sources(data: str | list[dict[str, Any]], setting_name: str, column: str | None) -> list[TextSource]:
    """Return the sources that a recipe's setting names.

    Args:
        data: One source, or a list of mappings.
        setting_name: The setting, for errors.
        column: The column that holds the text, where a source names none.

    Raises:
        ValueError: A source cannot be, none is named, or the weights make no mixture.
    """
    if isinstance(data, str):
        return [TextSource(path=data, column=column)]
    if not data:
        raise ValueError(f"{setting_name}: got an empty list, expected at least one source")
    sources = [build_recipe(one, TextSource, source=f"{setting_name}[{number}]") for number, one in enumerate(data)]
    weights = [source.weight for source in sources]
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        raise ValueError(
            f"{setting_name}: got weights for {len(given)} of {len(weights)} sources, expected all or none"
        )
    if given and not sum(given):
        raise ValueError(f"{setting_name}: got weights that sum to 0, expected a sum above 0")
    return [dataclasses.replace(source, column=source.column or column) for source in sources]
