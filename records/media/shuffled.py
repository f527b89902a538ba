"""The controls of a measurement on images and sounds: other media, or none."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from deepseek_records.media.item import IMAGE_PLACE, SOUND_PLACE, MediaItem


def with_media_of_others(items: Sequence[MediaItem], seed: int = 0) -> list[MediaItem]:
    """Return the questions, each with images and sounds of another question of as many of both.

    A model that looks is wrong on them as often as chance has it: the other's answer is right now and then.

    Args:
        items: The questions.
        seed: Of the exchange, a cycle through all that can be exchanged.
    """
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        alike[len(item.images), len(item.sounds)].append(number)
    rng = np.random.default_rng(seed)
    found = list(items)
    for numbers in alike.values():
        order = rng.permutation(numbers)
        for number, other in zip(order, np.roll(order, 1), strict=True):
            one = items[other]
            found[number] = dataclasses.replace(items[number], images=one.images, sounds=one.sounds)
    return found


def without_media(items: Sequence[MediaItem]) -> list[MediaItem]:
    """Return the questions without their images and sounds, as a model is asked that can only read.

    Args:
        items: The questions.
    """
    return [
        dataclasses.replace(
            item, images=(), sounds=(), prompt=item.prompt.replace(IMAGE_PLACE, "").replace(SOUND_PLACE, "").strip()
        )
        for item in items
    ]
