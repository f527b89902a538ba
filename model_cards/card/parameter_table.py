"""Parameters counted by part from a saved checkpoint, without building the model.

Reads only the headers of the safetensors files, so a 154 B checkpoint is counted in well under a second and a card
never states a number that the files do not hold. `modeling_deepseek` counts a *configuration* on the meta device,
and a test holds the two against each other.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.errors import SafetensorsParsingError
from huggingface_hub.utils import TensorInfo

from deepseek_model_cards.card.model_facts import ModelFacts, read_facts

PARTS = ("embedding", "attention", "routed experts", "shared experts", "router", "dense feed-forward", "norm", "other")
# Saved with the weights, but steered by load counts instead of gradients, so no parameters.
BUFFERS = (".e_score_correction_bias", ".share.state", ".weight_scale_inv", "_proj_scale_inv")
# Types that hold several quantized values in one number.
PACKED = ("U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F4")
# The first that a tensor's name matches; the names are those of transformers' families.
_RULES = (
    (r"\.shared_(experts?|mlp)\b|\.shared_expert_gate\.", "shared experts"),
    (r"\.experts\b|\.block_sparse_moe\.(input|output)_linear\.", "routed experts"),
    (r"\.(gate|router)\.", "router"),
    (r"\.(self_attn|attention|attn|linear_attn)\.", "attention"),
    (r"\b(embed_\w+|lm_head|wte|wpe|word_embeddings)\.", "embedding"),
    (r"norm[^.]*\.(weight|bias)$", "norm"),
    (r"\.(mlp|feed_forward|ffn)\.", "dense feed-forward"),
)


@dataclass(frozen=True)
class ParameterTable:
    """Counted parameters.

    Args:
        by_part: Parameters of each of `PARTS` that the checkpoint holds.
        total: All of them.
        active: Those that one token meets: everything but the routed experts it is not sent to; None where the
            files do not tell.
        dtypes: The stored types, most frequent first.
    """

    by_part: dict[str, int]
    total: int
    active: int | None
    dtypes: list[str]


def count_checkpoint(model_path: str | Path) -> ParameterTable:
    """Count the parameters of a checkpoint, or of an adapter, by part.

    Args:
        model_path: A folder with ``config.json`` or ``adapter_config.json``, and ``*.safetensors``.

    Returns:
        The counts.

    Raises:
        FileNotFoundError: The folder holds no safetensors file.
        ValueError: A file is cut short or of another kind, or the weights are packed.
    """
    path = Path(model_path)
    facts = read_facts(path)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"model: got {path}, expected a folder with *.safetensors")
    by_part: dict[str, int] = {}
    by_dtype: dict[str, int] = {}
    for file in files:
        for name, tensor in read_tensors(file).items():
            if name.endswith(BUFFERS):
                continue
            if tensor.dtype in PACKED:
                raise ValueError(f"model: got {name} of type {tensor.dtype} in {file}, expected unpacked weights")
            size = tensor.parameter_count
            part = part_of(name)
            by_part[part] = by_part.get(part, 0) + size
            by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + size
    total = sum(by_part.values())
    return ParameterTable(
        by_part={part: by_part[part] for part in PARTS if part in by_part},
        total=total,
        active=None if facts.is_adapter else _count_active(facts, total, by_part.get("routed experts", 0)),
        dtypes=sorted(by_dtype, key=lambda dtype: -by_dtype[dtype]),
    )


def try_to_count(model_path: Path | None) -> ParameterTable | None:
    """Return the counts, None where the folder's files do not tell them: other formats and packed weights.

    Args:
        model_path: The model's folder, or None.
    """
    if model_path is None or not list(model_path.glob("*.safetensors")):
        return None
    try:
        return count_checkpoint(model_path)
    except ValueError as error:
        if "expected unpacked weights" not in str(error):
            raise
        return None


def _count_active(facts: ModelFacts, total: int, routed: int) -> int | None:
    """Parameters that a token meets: with a dynamic number of experts, at the most that it may have."""
    experts, active = facts.num_routed_experts, facts.num_active_experts
    if not experts:
        return None if routed else total
    if not routed or not active:
        return None
    return round(total - routed * (1 - active / experts))


def read_tensors(file: Path) -> dict[str, TensorInfo]:
    """Return the names, shapes and types in a safetensors file.

    Args:
        file: The file.

    Raises:
        ValueError: The file is cut short or of another kind.
    """
    try:
        return parse_local_safetensors_file_metadata(file).tensors
    except (SafetensorsParsingError, RecursionError):
        raise ValueError(f"model: {file} is cut short or not a safetensors file") from None


def part_of(name: str) -> str:
    """Name the part of the model a tensor belongs to.

    Args:
        name: The tensor's name in the checkpoint.

    Returns:
        One of `PARTS`.
    """
    return next((part for pattern, part in _RULES if re.search(pattern, name)), "other")
