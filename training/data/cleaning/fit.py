"""Fits what the filters need to a sample of each source: repeated lines, language models and limits.

The sample is the documents whose texts have the least hashes, so that it depends neither on their order nor on how
many processes work.
"""

import heapq
from collections.abc import Callable, Iterable, Mapping

from deepseek_training.data.cleaning.boilerplate import find_boilerplate, remove_boilerplate
from deepseek_training.data.cleaning.contamination import ContaminationIndex
from deepseek_training.data.cleaning.documents import Document, Examined, hash_text
from deepseek_training.data.cleaning.examine import Context, half_of, repair_and_identify
from deepseek_training.data.cleaning.quality import fit_quality
from deepseek_training.recipes.data import DataRecipe

# Of a long document this much is fitted to.
_MOST_CHARACTERS = 4_000


def sample_documents(documents: Iterable[Document], size: int, tick: Callable[[int], object]) -> list[Document]:
    """Return the distinct documents with the least hashes, by hash.

    Args:
        documents: Of one source.
        size: How many.
        tick: Called with each document's number of characters.
    """
    heap: list[tuple[int, str, Document]] = []
    kept: set[str] = set()
    for document in documents:
        tick(len(document.text))
        key = hash_text(document.text)
        if key in kept:
            continue
        item = (-int(key, 16), document.id, document)
        if len(heap) < size:
            heapq.heappush(heap, item)
            kept.add(key)
        elif item[0] > heap[0][0]:
            removed = heapq.heapreplace(heap, item)
            kept.discard(hash_text(removed[2].text))
            kept.add(key)
    return [document for _, _, document in sorted(heap, key=lambda one: -one[0])]


def fit_context(
    samples: Mapping[str, list[Document]],
    trusted: list[Document] | None,
    recipe: DataRecipe,
    contamination: ContaminationIndex,
) -> Context:
    """Return what the filters need.

    Args:
        samples: By source.
        trusted: Clean documents, where there are any.
        recipe: The settings.
        contamination: The benchmarks.
    """
    context = Context(recipe, contamination=contamination)
    examined = {source: _first_filters(documents, recipe) for source, documents in samples.items()}
    if "boilerplate" in recipe.filters:
        context.boilerplate = {
            source: find_boilerplate(one.text for one in documents) for source, documents in examined.items()
        }
    if "quality" not in recipe.filters:
        return context
    groups: dict[tuple[str, str], list[Examined]] = {}
    if trusted is not None:
        for one in _first_filters(trusted, recipe):
            groups.setdefault(("", one.language), []).append(one)
    for source, documents in examined.items():
        known = context.boilerplate.get(source, frozenset())
        for one in documents:
            one.text = remove_boilerplate(one.text, known)[0]
            groups.setdefault((source, one.language), []).append(one)
    for key, members in groups.items():
        is_trusted = trusted is not None and not key[0]
        if not key[0] or ("", key[1]) not in groups:
            context.quality[key] = fit_quality(
                [one.text[:_MOST_CHARACTERS] for one in members],
                [half_of(one.document) for one in members],
                fence=recipe.fence,
                max_loss=recipe.max_trusted_loss if is_trusted else None,
            )
    return context


def _first_filters(documents: list[Document], recipe: DataRecipe) -> list[Examined]:
    examined = (repair_and_identify(document, recipe) for document in documents)
    return [one for one in examined if not one.dropped_by]
