"""Parameters counted by part from a saved checkpoint, without building the model.

Reads only the headers of the safetensors files, so a 154 B checkpoint is counted in well under a second and a card
never states a number that the files do not hold. The names are the official DeepSeek ones; `modeling_deepseek` counts
a *configuration* on the meta device, and a test holds the two against each other.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_records.json_files import read_object

PARTS = ("embedding", "attention", "routed experts", "shared experts", "router", "dense feed-forward", "norm", "other")
# Saved with the weights, but steered by load counts instead of gradients, so no parameters.
BUFFERS = (".e_score_correction_bias", ".share.state")


@dataclass(frozen=True)
class ParameterTable:
    """Counted parameters.

    Args:
        by_part: Parameters of each of `PARTS` that the checkpoint holds.
        total: All of them.
        active: Those that one token meets: everything but the routed experts it is not sent to.
        dtypes: The stored types, most frequent first.
    """

    by_part: dict[str, int]
    total: int
    active: int
    dtypes: list[str]


def count_checkpoint(model_path: str | Path) -> ParameterTable:
    """Count the parameters of a checkpoint by part.

    A token reaches ``num_experts_per_tok`` of ``n_routed_experts`` routed experts; with a dynamic number this is the
    upper bound, as the configuration's ``num_experts_per_tok`` is.

    Args:
        model_path: A folder with ``config.json`` and ``*.safetensors``.

    Returns:
        The counts.

    Raises:
        FileNotFoundError: The folder holds no safetensors file.
        ValueError: A file is cut short or no safetensors file.
    """
    path = Path(model_path)
    config = read_object(path / "config.json", "model")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"model: {path} holds no *.safetensors file")
    by_part: dict[str, int] = {}
    by_dtype: dict[str, int] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name.endswith(BUFFERS):
                continue
            size = math.prod(tensor["shape"])
            part = part_of(name)
            by_part[part] = by_part.get(part, 0) + size
            by_dtype[tensor["dtype"]] = by_dtype.get(tensor["dtype"], 0) + size
    total = sum(by_part.values())
    routed = by_part.get("routed experts", 0)
    idle = routed * (1 - config["num_experts_per_tok"] / config["n_routed_experts"]) if routed else 0
    return ParameterTable(
        by_part={part: by_part[part] for part in PARTS if part in by_part},
        total=total,
        active=round(total - idle),
        dtypes=sorted(by_dtype, key=by_dtype.get, reverse=True),
    )


def read_header(file: Path) -> dict[str, Any]:
    """Return the names, shapes and types in a safetensors file.

    Args:
        file: The file; the format is eight bytes of header length, then a JSON header.

    Raises:
        ValueError: The file is cut short or of another kind.
    """
    with open(file, "rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 0 < length <= file.stat().st_size - 8:
            raise ValueError(f"model: {file} is cut short or no safetensors file")
        text = stream.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"model: {file} is cut short or no safetensors file") from None
    return header


def part_of(name: str) -> str:
    """Name the part of the model a tensor belongs to.

    Args:
        name: The tensor's name in the checkpoint.

    Returns:
        One of `PARTS`.
    """
    rules = (
        (".mlp.experts.", "routed experts"),
        (".shared_experts.", "shared experts"),
        (".mlp.gate.", "router"),
        (".mlp.", "dense feed-forward"),
        (".self_attn.", "attention"),
        ("embed_tokens.", "embedding"),
        ("lm_head.", "embedding"),
        ("norm.", "norm"),
    )
    return next((part for piece, part in rules if piece in name), "other")
