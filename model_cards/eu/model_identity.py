"""Whether an evaluation measured the very weights that lie in a model's folder, by the hash that it kept of them.

A path may lead to other weights by now: the stage was run again, or a file was replaced. The model is loaded as the
evaluation loaded it and hashed in the same way, if it is small enough for that here.
"""

import functools
from pathlib import Path

from deepseek_records.stages import Stage

# Loading a larger one takes minutes and the memory of another machine.
MOST_BYTES = 4 << 30


def why_another_model(stage: Stage, model_path: Path | None) -> tuple[str, str]:
    """Return why an evaluation is not of this model, and why that cannot be told; both empty where it is of it.

    Args:
        stage: A finished evaluation.
        model_path: The model's folder; None where there is none to compare.
    """
    kept = stage.run.inputs.get("model")
    if model_path is None:
        return "", "no model lies here to compare"
    if kept is None:
        return "", "it kept no hash of its model"
    if stage.settings.get("trust_remote_code") or stage.settings.get("adapter"):
        return "", "its model had code or an adapter of its own"
    size = sum(file.stat().st_size for file in model_path.glob("*.safetensors"))
    if size > MOST_BYTES:
        return "", f"the model has {size:,} bytes, more than is loaded for a comparison"
    found = _hash(model_path.resolve(), str(stage.settings.get("dtype") or "auto"), _state_of(model_path))
    if found is None:
        return "", "the model could not be loaded here"
    if found == kept:
        return "", ""
    return f"it measured other weights (hash {kept[:12]} then, {found[:12]} now)", ""


def _state_of(model_path: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the model's files, so that a hash is kept for as long as they stay."""
    files = sorted(file for file in model_path.iterdir() if file.is_file())
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


@functools.lru_cache(maxsize=8)
def _hash(model_path: Path, dtype: str, state: tuple[tuple[str, int, int], ...]) -> str | None:
    from deepseek_records.hashes import hash_model
    from deepseek_records.loading import load_model

    try:
        return hash_model(load_model(model_path, dtype=dtype, trust_remote_code=False))
    except (ValueError, FileNotFoundError):  # what a model that cannot be loaded raises, in one line
        return None
