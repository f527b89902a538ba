"""Reads sounds into one channel of float32 at the rate that a model wants, and says in one line why it cannot."""

import math
from pathlib import Path
from typing import Any

import numpy as np

SOUND_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif"})
_LEAST_RATE, _MOST_RATE = 1000, 400_000
_LENGTH_OF_STREAMS = 2**31 - 2**16


def read_sound(source: Any, rate: int, where: str) -> np.ndarray:
    """Return a sound `[N]` of float32, its channels averaged, resampled to the rate wanted.

    Args:
        source: A file, or a mapping with `array` `[N]` or `[N, C]` and `sampling_rate`, as `datasets` has it.
        rate: Samples per second.
        where: What a message calls the row.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, empty, not finite, or its rate is none.
    """
    values, found = _read(source, where)
    name = f"{where}: {source}" if isinstance(source, str | Path) else f"{where}: the sound"
    if values.ndim == 2:
        values = values.mean(axis=1)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"{name}: got shape {values.shape}, expected samples of one or more channels")
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: got NaN or infinite samples, expected numbers")
    if not isinstance(found, int) or not _LEAST_RATE <= found <= _MOST_RATE:
        raise ValueError(f"{name}: got the sampling rate {found}, expected {_LEAST_RATE} to {_MOST_RATE} per second")
    return resample(values.astype(np.float32), found, rate)


def resample(values: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Return a sound at another rate, by a polyphase filter.

    Args:
        values: `[N]`.
        rate: Its samples per second.
        wanted: Those of the result.
    """
    if rate == wanted:
        return values
    try:
        from scipy.signal import resample_poly
    except ImportError:
        raise ValueError("data: resampling sounds needs scipy; pip install 'deepseek-moe[multimodal]'") from None
    divisor = math.gcd(rate, wanted)
    return resample_poly(values, wanted // divisor, rate // divisor).astype(np.float32)


def _read(source: Any, where: str) -> tuple[np.ndarray, Any]:
    if isinstance(source, dict) and "array" in source:
        return np.asarray(source["array"], dtype=np.float32), source.get("sampling_rate")
    if not isinstance(source, str | Path):
        raise ValueError(f"{where}: got {type(source).__name__}, expected a file or an array with its sampling_rate")
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{where}: no sound {path}")
    try:
        import soundfile
    except ImportError:
        raise ValueError(f"{where}: reading sounds needs soundfile; pip install 'deepseek-moe[multimodal]'") from None
    try:
        with soundfile.SoundFile(path) as file:
            values, rate, promised = file.read(dtype="float32", always_2d=True), file.samplerate, file.frames
    except (soundfile.SoundFileError, RuntimeError) as error:
        reason = str(error).replace(str(path), "the file").replace("PosixPath('the file')", "the file")
        if "does not exist" in reason:  # said of a content that no format begins with
            reason = "no format that soundfile knows"
        raise ValueError(f"{where}: {path} cannot be read as a sound ({reason})") from None
    if len(values) < promised or _is_cut(path):
        raise ValueError(f"{where}: {path} cannot be read as a sound (it ends before its header says)")
    return values, int(rate)


def _is_cut(path: Path) -> bool:
    """Whether a WAV file ends before its data does, which libsndfile reads as a shorter sound."""
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return False
        while len(chunk := file.read(8)) == 8:
            size = int.from_bytes(chunk[4:], "little")
            if chunk[:4] == b"data":
                # A stream's header does not know its length and names the largest.
                return file.tell() + size > path.stat().st_size and size < _LENGTH_OF_STREAMS
            file.seek(size + size % 2, 1)
    return False
