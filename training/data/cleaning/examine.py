"""The filters that look at one document by itself, in their order; any process can apply them.

`Context` holds what was fitted before. Each filter changes the text or drops the document, and a dropped one is not
looked at further.
"""

import dataclasses

from deepseek_training.data.cleaning.boilerplate import remove_boilerplate
from deepseek_training.data.cleaning.contamination import ContaminationIndex
from deepseek_training.data.cleaning.documents import Document, Examined, hash_text
from deepseek_training.data.cleaning.language import identify
from deepseek_training.data.cleaning.personal_data import mask
from deepseek_training.data.cleaning.quality import QualityModel, fit_quality
from deepseek_training.data.cleaning.repair import repair
from deepseek_training.data.cleaning.toxicity import unsafe_share
from deepseek_training.recipes.data import DataRecipe

EMPTY = "empty"


@dataclasses.dataclass
class Context:
    """What the filters need beside the document.

    Args:
        recipe: The settings.
        boilerplate: By source, the hashes of its repeated lines.
        quality: By source and language; of trusted text by ``""`` and language.
        contamination: The benchmarks' n-grams.
    """

    recipe: DataRecipe
    boilerplate: dict[str, frozenset[str]] = dataclasses.field(default_factory=dict)
    quality: dict[tuple[str, str], QualityModel] = dataclasses.field(default_factory=dict)
    contamination: ContaminationIndex = dataclasses.field(default_factory=lambda: ContaminationIndex.build({}))

    def quality_model(self, source: str, language: str) -> QualityModel:
        """Return the model that judges a document; one of loose limits where none was fitted.

        Args:
            source: Its source.
            language: Its language.
        """
        for key in (("", language), (source, language)):
            if key in self.quality:
                return self.quality[key]
        return _UNFITTED


_UNFITTED = fit_quality([], [], fence=1.0, max_loss=None)


def half_of(document: Document) -> int:
    """Return which half of the documents one belongs to: copies of a text to the same.

    Args:
        document: A document.
    """
    return int(hash_text(document.text), 16) % 2


def repair_and_identify(document: Document, recipe: DataRecipe) -> Examined:
    """Return a document after the first two filters, which nothing has to be fitted for.

    Args:
        document: As it was read.
        recipe: The settings.
    """
    examined = Examined(document, document.text)
    if "repair" in recipe.filters:
        examined.text, counts = repair(document.text)
        examined.change("repair", counts)
    if not examined.text.strip():
        examined.drop(EMPTY, "no text")
        return examined
    examined.language = identify(examined.text, recipe.languages)
    if "language" in recipe.filters and recipe.languages and examined.language not in recipe.languages:
        examined.drop("language", examined.language)
    return examined


def examine(document: Document, context: Context) -> Examined:
    """Return a document after all the filters that look at it alone.

    Args:
        document: As it was read.
        context: What was fitted.
    """
    recipe = context.recipe
    examined = repair_and_identify(document, recipe)
    if examined.dropped_by:
        return examined
    if "boilerplate" in recipe.filters:
        examined.text, count = remove_boilerplate(examined.text, context.boilerplate.get(document.source, frozenset()))
        examined.change("boilerplate", {"lines": count})
        if not examined.text.strip():
            examined.drop("boilerplate", "nothing else")
    if "quality" in recipe.filters and not examined.dropped_by:
        model = context.quality_model(document.source, examined.language)
        examined.figures = model.measure(examined.text, half_of(document))
        if reason := model.judge(examined.figures):
            examined.drop("quality", reason)
    if "toxicity" in recipe.filters and not examined.dropped_by:
        share = unsafe_share(examined.text)
        if share > recipe.max_unsafe_share:
            examined.drop("toxicity", f"{share:.0%} of its sentences are unsafe")
    # What the source itself holds out is never trained on; a benchmark may be made of it.
    if "contamination" in recipe.filters and not examined.dropped_by and document.split != "validation":
        leaked = context.contamination.find(examined.text, recipe.max_item_share)
        if leaked:
            examined.drop("contamination", ", ".join(f"{name} ({share:.0%})" for name, share in leaked[:3]))
    if "personal_data" in recipe.filters and not examined.dropped_by:
        examined.text, counts = mask(examined.text, names=recipe.mask_names)
        examined.change("personal_data", counts)
    return examined
