"""Keeps images and sounds of a few questions as files that a page can show: PNG, and WAV with its spectrogram."""

import shutil
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from deepseek_records.media.images import read_image
from deepseek_records.media.item import MediaItem
from deepseek_records.media.sounds import read_sound

_SIDE = 128
_FRAME = 256


def keep_media(items: Sequence[MediaItem], folder: Path, rate: int | None) -> None:
    """Write the first image or sound of each question, named by `file_name`.

    Args:
        items: The questions.
        folder: Made anew.
        rate: Samples per second of sounds.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for item in items:
        name = file_name(item.id)
        if item.images:
            _enlarge(read_image(item.images[0], item.id)).save(folder / f"{name}.png")
        elif item.sounds and rate is not None:
            sound = read_sound(item.sounds[0], rate, item.id)
            with wave.open(str(folder / f"{name}.wav"), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(rate)
                file.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())
            draw_spectrogram(sound).save(folder / f"{name}.png")


def file_name(item_id: str) -> str:
    """Return a question's id as a file's name.

    Args:
        item_id: The id.
    """
    return "".join(one if one.isalnum() or one in "-+" else "_" for one in item_id)


def draw_spectrogram(sound: np.ndarray) -> Image.Image:
    """Return a sound's spectrogram, time to the right, low tones at the bottom, loud is dark.

    Args:
        sound: `[N]`.
    """
    padded = np.pad(sound, (0, max(0, 2 * _FRAME - len(sound))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FRAME)[:: _FRAME // 4]
    power = np.abs(np.fft.rfft(frames * np.hanning(_FRAME))).T ** 2
    level = 10 * np.log10(np.maximum(power, 1e-12))
    share = np.clip((level - level.max() + 60) / 60, 0, 1)[::-1]
    image = Image.fromarray(255 - (share * 255).astype(np.uint8))
    return image.resize((_SIDE * 2, _SIDE), Image.Resampling.BILINEAR)


def _enlarge(image: Image.Image) -> Image.Image:
    scale = _SIDE / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
