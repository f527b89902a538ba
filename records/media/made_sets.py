"""Questions about images and sounds that need no download: digits of scikit-learn, drawn shapes, tones, spoken words.

All but the digits are synthetic. They are made from fixed seeds, so that every machine has the same. Held-out items
are other images, other draws, or other voices than the ones to train on.
"""

import functools
import shutil
import subprocess
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from deepseek_records.media.item import MediaItem

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 200, 40),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle")
RATE = 8000
_SIDE = 32
_NUM = {"train": 3000, "validation": 300}
_NUM_DIGITS_HELD_OUT = 360
WORDS = ("yes", "no", "up", "down", "left", "right", "stop", "go", "on", "off")
# Voices of espeak-ng; the held-out ones are two of other speakers and one of another accent.
_VOICES = {
    "train": [
        f"{accent}+{kind}"
        for accent in ("en-us", "en-gb")
        for kind in ("m1", "m2", "m4", "m5", "f1", "f2", "f4", "Andy", "Annie", "Lee")
    ],
    "validation": ["en-us+m3", "en-us+f3", "en-gb+m3", "en-gb+f3", "en-gb-scotland+m7"],
}
_SPEEDS = (140, 170, 200)
_WAV_HEADER = 44


@functools.cache
def digits(split: str) -> tuple[MediaItem, ...]:
    """Return handwritten digits, 8 x 8 in 17 shades: 1,437 to train on and 360 held out, in a fixed order.

    Args:
        split: `train` or `validation`.

    Raises:
        ValueError: scikit-learn, which brings them, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("digits: they come with scikit-learn; pip install 'deepseek-moe[multimodal]'") from None
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    chosen = order[:_NUM_DIGITS_HELD_OUT] if split == "validation" else order[_NUM_DIGITS_HELD_OUT:]
    pictures = 255 - np.round(bunch.images * (255 / 16)).astype(np.uint8)
    return tuple(
        MediaItem(
            id=f"digits/{number}",
            prompt="What digit is this?",
            answer=NUMBERS[bunch.target[number]],
            images=(pictures[number],),
            group="digit",
        )
        for number in chosen.tolist()
    )


@functools.cache
def shapes(split: str) -> tuple[MediaItem, ...]:
    """Return drawings of 1 to 4 equal shapes of one color, with a question about number, color or kind.

    Args:
        split: `train` or `validation`.
    """
    rng = np.random.default_rng([1, split == "validation"])
    return tuple(_drawing(f"shapes/{split}/{number}", rng) for number in range(_NUM[split]))


def _drawing(name: str, rng: np.random.Generator) -> MediaItem:
    shape, color = SHAPES[rng.integers(len(SHAPES))], list(COLORS)[rng.integers(len(COLORS))]
    number = int(rng.integers(1, 5))
    scale = 4  # drawn larger and made smaller, for smooth edges
    picture = Image.new("RGB", (_SIDE * scale, _SIDE * scale), tuple(int(one) for one in rng.integers(225, 256, 3)))
    draw = ImageDraw.Draw(picture)
    for cell in rng.permutation(4)[:number]:
        half = rng.uniform(4.0, 7.0) * scale
        middle = (np.array([cell % 2, cell // 2]) * 16 + 8 + rng.uniform(-1, 1, 2)) * scale
        box = [*(middle - half), *(middle + half)]
        if shape == "circle":
            draw.ellipse(box, fill=COLORS[color])
        elif shape == "square":
            draw.rectangle(box, fill=COLORS[color])
        else:
            draw.polygon([(box[0], box[3]), (box[2], box[3]), (middle[0], box[1])], fill=COLORS[color])
    asked = (
        ("number", "How many shapes are there?", NUMBERS[number]),
        ("color", "What color are they?", color),
        ("kind", "What shape is it?", shape),
    )
    group, prompt, answer = asked[rng.integers(3)]
    pixels = np.asarray(picture.resize((_SIDE, _SIDE), Image.Resampling.BOX))
    return MediaItem(id=name, prompt=prompt, answer=answer, images=(pixels,), group=group)


@functools.cache
def tones(split: str) -> tuple[MediaItem, ...]:
    """Return a second of 1 to 4 beeps at 8 kHz, with a question about their number, pitch or course.

    Args:
        split: `train` or `validation`.
    """
    rng = np.random.default_rng([2, split == "validation"])
    return tuple(_beeps(f"tones/{split}/{number}", rng) for number in range(_NUM[split]))


def _beeps(name: str, rng: np.random.Generator) -> MediaItem:
    number, is_high = int(rng.integers(1, 5)), bool(rng.integers(2))
    course = ("rises", "falls", "stays")[rng.integers(3)]
    pitch = rng.uniform(1100, 1800) if is_high else rng.uniform(250, 450)
    factor = {"rises": rng.uniform(1.6, 2.0), "falls": 1 / rng.uniform(1.6, 2.0), "stays": 1.0}[course]
    length = int(RATE * rng.uniform(0.14, 0.20))
    sound: np.ndarray = np.zeros(RATE, dtype=np.float32)
    slot = RATE // 4
    for place in sorted(rng.permutation(4)[:number]):
        start = place * slot + int(rng.integers(0, slot - length))
        times = np.arange(length) / RATE
        course_of = pitch * factor ** (times / times[-1])
        envelope = np.minimum(1, np.minimum(np.arange(length), np.arange(length)[::-1]) / (0.01 * RATE))
        phase = 2 * np.pi * np.cumsum(course_of) / RATE
        sound[start : start + length] += (rng.uniform(0.3, 0.8) * envelope * np.sin(phase)).astype(np.float32)
    sound += rng.normal(0, 10 ** rng.uniform(-3, -2), RATE).astype(np.float32)
    asked = (
        ("number", "How many beeps are there?", NUMBERS[number]),
        ("pitch", "Is the tone high or low?", "high" if is_high else "low"),
        ("course", "What does the tone do?", course),
    )
    group, prompt, answer = asked[rng.integers(3)]
    heard = {"array": np.round(sound, 5), "sampling_rate": RATE}
    return MediaItem(id=name, prompt=prompt, answer=answer, sounds=(heard,), group=group)


@functools.cache
def words(split: str) -> tuple[MediaItem, ...]:
    """Return ten words spoken by espeak-ng, in 60 ways each to train on; the held-out voices are others.

    Args:
        split: `train` or `validation`.

    Raises:
        ValueError: espeak-ng is not installed.
    """
    program = shutil.which("espeak-ng")
    if program is None:
        raise ValueError("words: they are spoken by espeak-ng, which is not installed; take tones, or install it")
    return tuple(
        MediaItem(
            id=f"words/{voice}/{speed}/{word}",
            prompt="What word is spoken?",
            answer=word,
            sounds=({"array": _speak(program, word, voice, speed), "sampling_rate": RATE},),
            group="word",
        )
        for voice in _VOICES[split]
        for speed in _SPEEDS
        for word in WORDS
    )


def _speak(program: str, word: str, voice: str, speed: int) -> np.ndarray:
    from deepseek_records.media.sounds import resample

    asked = [program, "-v", voice, "-s", str(speed), "--stdout", word]
    done = subprocess.run(asked, capture_output=True, check=False)
    if done.returncode or len(done.stdout) <= _WAV_HEADER:
        raise ValueError(f"words: espeak-ng cannot speak with voice {voice} ({done.stderr.decode().strip()})")
    rate = int.from_bytes(done.stdout[24:28], "little")
    samples = np.frombuffer(done.stdout[_WAV_HEADER:], dtype="<i2")  # a stream's header does not know its length
    sound = resample(samples.astype(np.float32) / 32768, rate, RATE)
    loud = np.nonzero(np.abs(sound) > 0.01)[0]
    return np.round(sound[loud[0] : loud[-1] + 1][:RATE], 5)


SETS: dict[str, Callable[[str], tuple[MediaItem, ...]]] = {
    "digits": digits,
    "shapes": shapes,
    "tones": tones,
    "words": words,
}
