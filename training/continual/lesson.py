"""What an update brings together before it trains: the new text, every text before, the gate's sets and the replay."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from deepseek_records.hashes import hash_tokenizer
from deepseek_records.loading import load_tokenizer
from deepseek_training.continual.decision import GateSets
from deepseek_training.continual.lineage_texts import TaughtText, taught_texts
from deepseek_training.continual.merge_weights import check_plain
from deepseek_training.continual.reservoir import Reservoir
from deepseek_training.data.corpus import Corpus, distinct_names
from deepseek_training.data.packing import encode_documents
from deepseek_training.data.recipe_blocks import check_end_token, pack
from deepseek_training.recipes.text_sources import TextSource
from deepseek_training.recipes.update import UpdateRecipe

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Lesson:
    """An update's texts.

    Attributes:
        new: The new text.
        earlier: Every text that the model learned before, and the recipe's general texts.
        tokenizer: The model's.
        sets: What the gate measures on.
        part: The new text's blocks.
        reservoir: Blocks of the earlier text.
    """

    new: Corpus
    earlier: list[Corpus]
    tokenizer: PreTrainedTokenizerBase
    sets: GateSets
    part: Any
    reservoir: Reservoir

    @classmethod
    def prepare(cls, recipe: UpdateRecipe, run: Path, base: Path) -> "Lesson":
        """Return what an update works with.

        Args:
            recipe: The settings.
            run: The run folder.
            base: The old model.

        Raises:
            FileNotFoundError: A text is missing.
            ValueError: A text cannot be used, is known to the model already, or nothing is held out.
        """
        check_plain(base)
        taught = taught_texts(run, base)
        source = TextSource(path=recipe.data, column=recipe.data_column)
        mine = TaughtText(source, recipe.encoding, run)
        known = {one.key: one for one in taught}
        if mine.key in known:
            raise ValueError(
                f"data: got {recipe.data}, which {known[mine.key].stage} has taught already, expected new text"
            )
        general = [TextSource(path=name, column=recipe.general_column) for name in recipe.general_data]
        others = {one.key: one for one in (TaughtText(one, recipe.encoding, run) for one in general)}
        earlier = [one.load() for one in {**known, **others}.values()]
        new, tokenizer = Corpus.read(source, recipe.encoding), load_tokenizer(base)
        check_end_token(tokenizer)
        sets = GateSets.prepare(new, earlier, tokenizer, recipe)
        part = pack(recipe, encode_documents(new.train, tokenizer), tokenizer)
        return cls(new, earlier, tokenizer, sets, part, _replay(recipe, base, earlier, tokenizer))

    @property
    def sizes(self) -> list[tuple[str, int, int]]:
        """Name, documents to train on and held-out units of each text."""
        sizes = {one.name: len(one.texts) for one in self.sets.all}
        corpora = [self.new, *self.earlier]
        names = distinct_names(corpora)
        return [(name, len(one.train), sizes.get(name, 0)) for name, one in zip(names, corpora, strict=True)]

    def learned(self, seed: int) -> Reservoir:
        """Return the replay of a model that has learned the new text too.

        Args:
            seed: Of the sample.
        """
        return self.reservoir.add(self.sets.new.name, self.part, seed=seed)


def _replay(recipe: UpdateRecipe, base: Path, earlier: list[Corpus], tokenizer: PreTrainedTokenizerBase) -> Reservoir:
    """The reservoir that lies beside a model where it fits; else one that is drawn now."""
    kept, names = Reservoir.load(base.parent), distinct_names(earlier)
    hashed = hash_tokenizer(tokenizer)
    if kept is not None and kept.tokenizer != hashed:
        raise ValueError(f"tokenizer: got another one in {base} than that of the replay beside it, expected the same")
    if kept is not None and kept.fits(names, recipe.replay_blocks, recipe.sequence_length):
        return kept
    if kept is not None:
        logger.warning("replay: drawn anew, for the sources, replay_blocks or sequence_length are others than before")
    found = Reservoir({}, {}, recipe.replay_blocks, hashed)
    for name, corpus in zip(names, earlier, strict=True):
        found = found.add(name, pack(recipe, encode_documents(corpus.train, tokenizer), tokenizer), seed=recipe.seed)
    return found
