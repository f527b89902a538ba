"""One question about images or sounds, and where they go in it."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

IMAGE_PLACE, SOUND_PLACE = "<image>", "<audio>"


@dataclasses.dataclass(frozen=True)
class MediaItem:
    """A question about images, sounds, or neither, with its answer.

    Args:
        id: Unique within its set.
        prompt: The question. Each image goes where it says `<image>`, each sound where it says `<audio>`; where it
            says neither, they go in front.
        answer: What is to be answered.
        images: Files, PIL images or arrays.
        sounds: Files, or mappings with `array` and `sampling_rate`.
        group: What scores are also broken down by.
        where: Where the row stands, for errors.
    """

    id: str
    prompt: str
    answer: str
    images: tuple[Any, ...] = ()
    sounds: tuple[Any, ...] = ()
    group: str = ""
    where: str = ""

    @property
    def text(self) -> str:
        """The question with a place for each image and sound.

        Raises:
            ValueError: There are more or fewer places than images or sounds.
        """
        front = ""
        for place, media in ((IMAGE_PLACE, self.images), (SOUND_PLACE, self.sounds)):
            found = self.prompt.count(place)
            if found not in (0, len(media)):
                raise ValueError(
                    f"{self.where or self.id}: got {found} {place} in the prompt, expected {len(media)}, as many as "
                    f"there are {'images' if place == IMAGE_PLACE else 'sounds'}"
                )
            front += "" if found else place * len(media)
        return f"{front}\n{self.prompt}" if front else self.prompt

    def to_row(self) -> list[Any]:
        """Return what the item consists of as JSON takes it, media by hash of their bytes."""
        media = [_hash(one) for one in (*self.images, *self.sounds)]
        return [self.id, self.prompt, self.answer, len(self.images), media]


def _hash(source: Any) -> str:
    import numpy as np

    if isinstance(source, dict):
        array = np.ascontiguousarray(source["array"])
        return hashlib.sha256(f"{source.get('sampling_rate')}".encode() + array.tobytes()).hexdigest()
    if isinstance(source, str | Path):
        return hashlib.sha256(Path(source).read_bytes()).hexdigest()
    return hashlib.sha256(np.ascontiguousarray(np.asarray(source)).tobytes()).hexdigest()
