"""Reads images of any mode and depth into 8-bit RGB, and says in one line why it cannot."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
_DAMAGED = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def read_image(source: Any, where: str) -> Image.Image:
    """Return an image as RGB: turned as its camera says, transparency put on white, 16 bits cut to 8.

    Args:
        source: A file, a PIL image, or an array `[H, W]` or `[H, W, 3]` of uint8.
        where: What a message calls the row.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or no image.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    if isinstance(source, np.ndarray):
        is_image = source.dtype == np.uint8 and (source.ndim == 2 or source.shape[2:] == (3,)) and source.size
        if not is_image:
            raise ValueError(
                f"{where}: got an array {source.shape} of {source.dtype}, expected [H, W] or [H, W, 3] of uint8"
            )
        return to_rgb(Image.fromarray(source))
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{where}: no image {path}")
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(image)
    except _DAMAGED as error:
        reason = str(error).replace(str(path), "the file")
        raise ValueError(f"{where}: {path} cannot be read as an image ({reason})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as 8-bit RGB.

    Args:
        image: Of any mode. Of gray values of more than 8 bits the highest 8 are kept; floats are in [0, 1].
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray(np.clip(values >> 8, 0, 255).astype(np.uint8))
    elif image.mode == "F":
        image = Image.fromarray((np.clip(np.nan_to_num(np.asarray(image)), 0, 1) * 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return image.convert("RGB")
