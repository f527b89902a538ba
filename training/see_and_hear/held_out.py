"""Held-out questions as the multimodal stage scores them: bits per byte of the answers, given image or sound."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from deepseek_records.media.asking import answer_items
from deepseek_records.media.item import MediaItem
from deepseek_records.media.shuffled import with_media_of_others
from deepseek_records.summary import Sample
from deepseek_training.recipes.multimodal import MultimodalRecipe
from deepseek_training.see_and_hear.lessons import Collator, encode_items
from deepseek_training.trainer.bits_per_byte import BitsPerByte

NUM_SAMPLES = 6


@dataclasses.dataclass(frozen=True)
class HeldOutQuestions:
    """Held-out questions of one source, whose answers are scored.

    Attributes:
        name: As it appears in the figures.
        items: The questions.
        processor: Of the model.
    """

    name: str
    items: Sequence[MediaItem]
    processor: Any

    @property
    def rows(self) -> Sequence[Any]:
        """What it consists of, as JSON takes it."""
        return [item.to_row() for item in self.items]

    def shuffled(self) -> "HeldOutQuestions":
        """Return the same questions with images and sounds of others among them."""
        return dataclasses.replace(self, items=with_media_of_others(self.items))

    @torch.no_grad()
    def measure(self, model: Any, recipe: MultimodalRecipe) -> BitsPerByte:
        """Return the bits per byte of the answers, the end token included.

        Args:
            model: The model.
            recipe: Names batch size and length.
        """
        was_training, device = model.training, next(model.parameters()).device
        model.eval()
        collate, tokenizer = Collator(self.processor), self.processor.tokenizer
        examples = encode_items(self.items, self.processor, recipe.sequence_length)
        nats, counts, num_bytes = [], [], 0
        for start in range(0, len(examples), recipe.batch_size):
            part = examples[start : start + recipe.batch_size]
            batch = {name: value.to(device) for name, value in collate(part).items()}
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch, use_cache=False).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            nats += losses.view(labels.shape).sum(1).tolist()  # 0 where the label is -100
            counts += (labels != -100).sum(1).tolist()
            answers = [one.input_ids[one.num_given :] for one in part]
            num_bytes += sum(len(tokenizer.decode(ids, skip_special_tokens=True).encode()) for ids in answers)
        model.train(was_training)
        return BitsPerByte.from_windows(nats, counts, num_bytes)

    def sample(self, model: Any, recipe: MultimodalRecipe) -> tuple[Sample, ...]:
        """Return greedy answers to a few of the questions, with the right ones in brackets."""
        was_training = model.training
        chosen = self.items[:: max(1, len(self.items) // NUM_SAMPLES)][:NUM_SAMPLES]
        answers = answer_items(model.eval(), self.processor, chosen, recipe.answer_tokens)
        model.train(was_training)
        return tuple(
            Sample(prompt=f"{item.id}: {item.prompt} ({item.answer})", completion=answer)
            for item, answer in zip(chosen, answers, strict=True)
        )
