"""What the multimodal stage trains on: questions with images and sounds, and batches of replayed text between them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from deepseek_records.hashes import hash_rows
from deepseek_records.media.asking import encode_answer, encode_question, pad, read_features
from deepseek_records.media.item import MediaItem
from deepseek_training.data.mixture import Mixture
from deepseek_training.data.packing import PackedDataset

# Features are kept between passes over the data up to this size; beyond, they are read again.
_MOST_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class Example:
    """A question with its answer, encoded.

    Attributes:
        item: The question.
        input_ids: Of both.
        num_given: How many of them are the question's.
    """

    item: MediaItem
    input_ids: list[int]
    num_given: int

    @property
    def labels(self) -> list[int]:
        """The answer's ids, -100 elsewhere."""
        return [-100] * self.num_given + self.input_ids[self.num_given :]


def encode_items(items: Sequence[MediaItem], processor: Any, length: int) -> list[Example]:
    """Return questions with their answers, encoded.

    Args:
        items: The questions.
        processor: Of the model.
        length: The most tokens of both.

    Raises:
        ValueError: One is longer.
    """
    examples = []
    for item in items:
        asked = encode_question(item, processor)
        whole = [*asked, *encode_answer(item, processor)]
        if len(whole) > length:
            raise ValueError(
                f"sequence_length: got {length}, expected at least {len(whole)}, the tokens of {item.where or item.id}"
            )
        examples.append(Example(item, whole, len(asked)))
    return examples


class Lessons(torch.utils.data.Dataset):
    """Rows in the order they are trained on: every optimizer step is all questions, or all text.

    Text has longer rows; in one batch with questions most of it would be padding.

    Args:
        sources: The questions of each source, which are asked in turn, whatever their numbers.
        texts: The blocks of each source of text.
        weights: Of these sources.
        num_steps: Optimizer steps.
        num_first: Steps at the start without text.
        rows_per_step: Over all processes.
        replay_share: Share of the later steps that are text.
        seed: Of the order.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Example]],
        texts: Sequence[PackedDataset],
        weights: Sequence[float],
        *,
        num_steps: int,
        num_first: int,
        rows_per_step: int,
        replay_share: float,
        seed: int,
    ) -> None:
        self.examples = [one for source in sources for one in source]
        rng = np.random.default_rng(seed)
        self.is_text: np.ndarray = np.zeros(num_steps, dtype=bool)
        num_text = round(replay_share * (num_steps - num_first))
        # At even distances: step k is text where k * share passes a whole number.
        later = np.arange(num_steps - num_first + 1) * (num_text / max(1, num_steps - num_first))
        self.is_text[num_first:] = np.diff(np.floor(later + 1e-9)) > 0
        num_rows = [int((~self.is_text).sum()) * rows_per_step, int(self.is_text.sum()) * rows_per_step]
        streams = [_in_turn([len(source) for source in sources], num_rows[0], rng), list(range(num_rows[1]))[::-1]]
        self.blocks = Mixture(texts, weights, num_rows[1], seed=seed)
        self.order = [
            (bool(is_text), int(number))
            for is_text in self.is_text
            for number in _take(streams[int(is_text)], rows_per_step)
        ]

    def __len__(self) -> int:
        """Return the number of rows of all steps."""
        return len(self.order)

    def __getitem__(self, place: int) -> Example | dict[str, Any]:
        """Return the row that is trained on at a place in the order."""
        is_text, number = self.order[place]
        return self.blocks[number] if is_text else self.examples[number]

    @property
    def identity(self) -> str:
        """A hash of all content, and of the order."""
        rows = ([one.item.to_row(), one.input_ids] for one in self.examples)
        return hash_rows([self.blocks.identity, hash_rows(rows), hash_rows([list(one) for one in self.order])])


def _passes(size: int, count: int, rng: np.random.Generator) -> list[int]:
    """Indices of whole passes, each in another order, cut to a count; the first is taken from the end."""
    drawn: list[int] = []
    while len(drawn) < count:  # a whole number of passes and a part of one
        drawn += rng.permutation(size).tolist()
    return drawn[:count][::-1]


def _in_turn(sizes: Sequence[int], count: int, rng: np.random.Generator) -> list[int]:
    """Indices into sources that lie one behind another, one of each in turn; the first is taken from the end."""
    starts = np.cumsum([0, *sizes[:-1]])
    each = -(-count // len(sizes))
    drawn = [start + np.array(_passes(size, each, rng)) for start, size in zip(starts, sizes, strict=True)]
    return np.stack(drawn, axis=1).flatten()[:count].tolist()[::-1]


def _take(stream: list[int], count: int) -> list[int]:
    return [stream.pop() for _ in range(count)]


class Collator:
    """Makes a batch of rows, all questions or all text.

    Args:
        processor: Of the model.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        filler = processor.tokenizer.pad_token_id
        self._filler = processor.tokenizer.eos_token_id if filler is None else filler
        self._kept: dict[str, dict[str, torch.Tensor]] = {}
        self._room = _MOST_BYTES

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Return the model's inputs with labels.

        Args:
            rows: From `Lessons`.
        """
        if not isinstance(rows[0], Example):
            ids = torch.stack([torch.as_tensor(np.asarray(row["input_ids"], dtype=np.int64)) for row in rows])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        labels = pad([row.labels for row in rows], -100)["input_ids"]
        padded = pad([row.input_ids for row in rows], self._filler)
        parts = [self._features(row.item) for row in rows]
        names = sorted({name for part in parts for name in part})
        features = {name: torch.cat([part[name] for part in parts if name in part]) for name in names}
        return {**padded, "labels": labels, **features}

    def _features(self, item: MediaItem) -> dict[str, torch.Tensor]:
        if item.id in self._kept:
            return self._kept[item.id]
        made = read_features([item], self.processor)
        size = sum(one.numel() * one.element_size() for one in made.values())
        if size <= self._room:
            self._room -= size
            self._kept[item.id] = made
        return made
