"""Sets of questions about images and sounds: made here, or of the user's files.

A table (JSON Lines, CSV, Parquet) or a folder with a `metadata.jsonl` or `.csv` in it, one row per question:
`prompt`, `answer`, and `image`, `images`, `audio`, `sounds` or, as `datasets` calls it, `file_name`; paths count from
the table's folder. A Hub id works where its rows have these columns.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deepseek_records.hashes import hash_rows
from deepseek_records.media.images import IMAGE_SUFFIXES, read_image
from deepseek_records.media.item import MediaItem
from deepseek_records.media.made_sets import SETS
from deepseek_records.media.sounds import SOUND_SUFFIXES, read_sound
from deepseek_records.nearest_name import did_you_mean
from deepseek_records.row_files import TABLE_SUFFIXES, is_hub_id, load_hub_data, read_table, suffix_of

_TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_HELD_OUT_NAMES = ("validation", "test", "val", "dev")


def load_items(source: str | Path, split: str, *, what: str = "data") -> list[MediaItem]:
    """Return the questions of one split, their places checked.

    Args:
        source: `digits`, `shapes`, `tones` or `words`; a table or a folder with one; a Hub id.
        split: `train` or `validation`. Rows with a column `split` keep theirs; else one in ten is held out, by a hash.
        what: The setting that named it, for errors.

    Raises:
        FileNotFoundError: There is no such table.
        ValueError: A row lacks something, or no row is left.
    """
    if str(source) in SETS:
        return list(SETS[str(source)](split))
    items = [
        item
        for row, where, folder in _rows(source, what)
        if _split_of(row, where) == split
        for item in [_item(row, where, folder)]
    ]
    if not items:
        raise ValueError(f"{what}: {source} has no row of the split {split}")
    return items


def check_media(items: Sequence[MediaItem], rate: int | None, seconds: float | None, *, has_eyes: bool) -> None:
    """Read every image and sound once, so that a damaged one is told before any work.

    Args:
        items: The questions.
        rate: Of the model's audio encoder; None for a model that does not hear.
        seconds: The longest sound that it takes.
        has_eyes: Whether it sees.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, a sound too long, or the model has no encoder for what there is.
    """
    for item in items:
        where = item.where or item.id
        for kind, media, can in (("image", item.images, has_eyes), ("sound", item.sounds, rate is not None)):
            if media and not can:
                raise ValueError(f"{where}: got {kind}s, expected none; the model has no encoder for them")
        for image in item.images:
            if not hasattr(image, "dtype"):
                read_image(image, where)
        for sound in item.sounds:
            if rate is not None and seconds is not None:
                length = len(read_sound(sound, rate, where)) / rate
                if length > seconds + 0.5 / rate:
                    name = f": {sound}" if isinstance(sound, str | Path) else ""
                    raise ValueError(f"{where}{name}: got {length:.2f} s of sound, expected at most {seconds:g} s")


def _rows(source: str | Path, what: str) -> Iterator[tuple[dict[str, Any], str, Path]]:
    path = Path(source).expanduser()
    if path.is_dir():
        found = next((path / name for name in _TABLES if (path / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{what}: {path} holds none of {', '.join(_TABLES)}")
        path = found
    if path.is_file():
        if suffix_of(path) not in TABLE_SUFFIXES:
            raise ValueError(f"{what}: got {path}, expected a table ({', '.join(sorted(TABLE_SUFFIXES))}) or a folder")
        yield from ((row, where, path.parent) for row, where in read_table(path, what))
        return
    if "/" not in str(source) or not is_hub_id(str(source)) or str(source).startswith((".", "/")):
        hint = did_you_mean(str(source), SETS)
        raise FileNotFoundError(f"{what}: got {str(source)!r}, expected {', '.join(SETS)}, a table or a folder{hint}")
    for name, rows in load_hub_data(str(source), "a table or a folder").items():
        for number, row in enumerate(rows, start=1):
            yield {"split": name, **row}, f"{what}: {source}, split {name}, row {number}", Path()


def _split_of(row: dict[str, Any], where: str) -> str:
    if row.get("split") is None:
        shown = {key: value for key, value in row.items() if isinstance(value, str | int | float | list)}
        return "validation" if int(hash_rows([shown])[:8], 16) % 10 == 0 else "train"
    if not isinstance(row["split"], str):
        raise ValueError(f"{where}: split: got {row['split']!r}, expected text")
    return "validation" if row["split"] in _HELD_OUT_NAMES else "train"


def _item(row: dict[str, Any], where: str, folder: Path) -> MediaItem:
    texts = []
    for name in ("prompt", "answer"):
        value = row.get(name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: {name}: got {value!r}, expected text".replace("got None", f"got no {name}"))
        texts.append(value.strip() if name == "answer" else value)
    images = [*_listed(row, "image", where), *_listed(row, "images", where)]
    sounds = [*_listed(row, "audio", where), *_listed(row, "sounds", where)]
    for name in _listed(row, "file_name", where):
        suffix = Path(str(name)).suffix.lower()
        if suffix not in IMAGE_SUFFIXES | SOUND_SUFFIXES:
            raise ValueError(f"{where}: file_name: got {name!r}, expected an image or a sound")
        (images if suffix in IMAGE_SUFFIXES else sounds).append(name)
    key = hashlib.sha256(where.rpartition(":")[2].encode()).hexdigest()[:8]
    item = MediaItem(
        id=str(row.get("id") or f"{Path(where.partition(',')[0]).stem}/{where.rpartition(' ')[2]}-{key}"),
        prompt=texts[0],
        answer=texts[1],
        images=tuple(_beside(folder, one) for one in images),
        sounds=tuple(_beside(folder, one) for one in sounds),
        group=str(row.get("group") or ""),
        where=where,
    )
    assert item.text  # which looks at the places
    return item


def _listed(row: dict[str, Any], name: str, where: str) -> list[Any]:
    value = row.get(name)
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    for one in values:
        if isinstance(one, bool | int | float) or one == "":
            raise ValueError(f"{where}: {name}: got {one!r}, expected a file")
    return values


def _beside(folder: Path, source: Any) -> Any:
    return folder / source if isinstance(source, str) else source
