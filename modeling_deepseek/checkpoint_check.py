"""What a checkpoint's files hold, read from their headers, and one-line errors where that is not what they should.

`DeepseekPreTrainedModel` calls it before and after transformers loads. Surprising: transformers only warns of tensors
that are nowhere and fills them with random numbers, and its own messages name neither the shard nor the tensor.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

_EXPERT = re.compile(r"^(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")
_SCALE = "_scale_inv"
# What loading with another head, or with a router setting that the checkpoint was not made with, has to add. Such
# tensors are initialized, and transformers names them in a warning.
_ADDED = re.compile(r"(^|\.)score\.|\.gate\.(query_weight|expert_keys|share\.state)$")


@dataclass(frozen=True)
class StoredTensor:
    """One entry of a safetensors header.

    Attributes:
        dtype: As safetensors writes it, for example ``F8_E4M3``.
        shape: Its sizes.
        path: The file.
    """

    dtype: str
    shape: tuple[int, ...]
    path: Path


def read_headers(paths: Iterable[str | Path]) -> dict[str, StoredTensor]:
    """Return the tensors of safetensors files by name.

    Args:
        paths: The files.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file is cut short or no safetensors file.
    """
    return {name: tensor for path in paths for name, tensor in _read_header(Path(path)).items()}


def _read_header(path: Path) -> dict[str, StoredTensor]:
    if not path.is_file():
        raise FileNotFoundError(f"shard: {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            entries = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: StoredTensor(row.get_dtype(), tuple(row.get_shape()), path) for name, row in entries.items()}
    except SafetensorError as error:
        raise ValueError(f"shard: {path}: got a file that is cut short or of another kind ({error})") from None


def check_index(folder: str | Path) -> None:
    """Raise ValueError, in one line, if a folder's weights are in shards and the index of these cannot be used.

    transformers' own errors there are those of the JSON parser and of missing keys, and name no file.

    Args:
        folder: A checkpoint's; one that does not exist, or holds no index, is none of this check's business.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (Path(folder) / name).is_file():  # Then transformers passes the index over.
            return
        index = Path(folder) / f"{name}.index.json"
        if index.is_file():
            read_weight_map(index)
            return


def read_weight_map(index: Path) -> dict[str, str]:
    """Return each tensor's file name.

    Args:
        index: The file, ``model.safetensors.index.json`` for example.

    Raises:
        ValueError: It is cut short or no index, or names a file elsewhere.
    """
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"index: {index}: got no JSON ({error}), expected an object") from None
    for key in ("metadata", "weight_map"):
        if not isinstance(entries, dict) or not isinstance(entries.get(key), dict):
            raise ValueError(f"index: {index} has no {key}, expected an object")
    weight_map = entries["weight_map"]
    wrong = next((name for name, shard in weight_map.items() if not isinstance(shard, str) or not shard), None)
    if wrong is not None or not weight_map:
        where = "an empty weight_map" if wrong is None else f"{weight_map[wrong]!r} for {wrong!r}"
        raise ValueError(f"index: {index} has {where}, expected a file name for each tensor")
    away = next((shard for shard in weight_map.values() if "/" in shard or "\\" in shard or shard == ".."), None)
    if away is not None:
        raise ValueError(f"index: got {away!r} in {index}, expected a file beside it")
    return weight_map


def check_tensors(tensors: dict[str, StoredTensor], weight_map: dict[str, str], num_experts: int) -> None:
    """Raise ValueError, in one line, if the files contradict the index or hold half of what belongs together.

    Args:
        tensors: What the files hold.
        weight_map: Each tensor's file name, as in ``model.safetensors.index.json``; empty: there is no index.
        num_experts: Experts of each layer.
    """
    absent = [name for name, shard in weight_map.items() if name not in tensors or tensors[name].path.name != shard]
    # First what is nowhere: a shard under another's name is told by what it lacks.
    absent.sort(key=lambda name: name in tensors)
    if absent:
        shard, where = weight_map[absent[0]], "no shard holds it"
        if absent[0] in tensors:
            where = f"{tensors[absent[0]].path.name} holds it"
        raise ValueError(
            f"shard: {shard} lacks {absent[0]!r}, which the index places there; {where} ({_more(absent)} like it)"
        )
    _check_experts(tensors, num_experts)


def _check_experts(tensors: dict[str, StoredTensor], num_experts: int) -> None:
    found: dict[str, set[tuple[int, str]]] = {}
    for match in filter(None, map(_EXPERT.match, tensors)):
        found.setdefault(match[1], set()).add((int(match[2]), match[3]))
    wanted = {(expert, part) for expert in range(num_experts) for part in ("gate", "up", "down")}
    for prefix, present in found.items():
        if present != wanted:
            expert, part = min(wanted ^ present)
            has = "lacks" if (expert, part) in wanted else f"has n_routed_experts={num_experts}, but holds"
            raise ValueError(f"checkpoint: it {has} '{prefix}.{expert}.{part}_proj.weight'")


def check_shapes(tensors: dict[str, StoredTensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError, in one line, if a tensor is not of the model's shape.

    Args:
        tensors: What the files hold.
        wanted: The model's shapes by name; experts fused. Names may lack or have the decoder's ``model.``.
    """
    wanted = {name.removeprefix("model."): tuple(shape) for name, shape in wanted.items()}
    for name, tensor in tensors.items():
        shape = wanted.get(name.removeprefix("model."))
        expert = _EXPERT.match(name)
        if expert is not None:
            fused = "down_proj" if expert[3] == "down" else "gate_up_proj"
            shape = wanted.get(f"{expert[1].removeprefix('model.')}.{fused}")
            if shape is not None:
                shape = shape[1:] if expert[3] == "down" else (shape[1] // 2, shape[2])
        if shape is not None and tensor.shape != shape:
            raise ValueError(f"shard: {tensor.path.name} holds {name!r} of shape {tensor.shape}, expected {shape}")


def check_scales(tensors: dict[str, StoredTensor], block_size: tuple[int, int]) -> None:
    """Raise ValueError, in one line, if an FP8 weight has no scales, or scales have no weight or not one a block.

    Args:
        tensors: What the files hold.
        block_size: Rows and columns of a block.
    """
    for name, tensor in tensors.items():
        if tensor.dtype.startswith("F8_E") and not name.endswith((".weight", _SCALE)):
            raise ValueError(
                f"shard: {tensor.path.name} holds {name!r} in FP8, expected only names that end in .weight"
            )
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) not in tensors:
            raise ValueError(f"shard: {tensor.path.name} holds {name!r}, but no shard the weight it scales")
        if tensor.dtype.startswith("F8_E") and len(tensor.shape) > 1 and name + _SCALE not in tensors:
            raise ValueError(f"shard: {tensor.path.name} holds {name!r} in FP8, but no shard holds its '{_SCALE[1:]}'")
        if name.endswith(_SCALE):
            weight = tensors[name.removesuffix(_SCALE)].shape
            blocks = tuple(-(-length // block) for length, block in zip(weight, block_size, strict=False))
            if tensor.shape != blocks:
                raise ValueError(
                    f"shard: {tensor.path.name} holds {name!r} of shape {tensor.shape}, expected {blocks} for a "
                    f"weight of {weight} in blocks of {block_size}"
                )


def refuse_fp8(tensors: dict[str, StoredTensor]) -> None:
    """Raise ValueError, in one line, if there is an FP8 weight.

    Without its scales it would be loaded as it is, and wrong.

    Args:
        tensors: What the files hold.
    """
    for name, tensor in tensors.items():
        if tensor.dtype.startswith("F8_E"):
            raise ValueError(
                f"shard: {tensor.path.name} holds {name!r} in FP8, but config.json has no quantization_config for it"
            )


def refuse_missing(names: Iterable[str], source: str) -> None:
    """Raise ValueError naming what is missing, unless the caller's own settings brought it in.

    Args:
        names: Tensors of the model that the checkpoint does not hold.
        source: The checkpoint, for the message.
    """
    lacking = sorted(name for name in names if not _ADDED.search(name))
    if lacking:
        raise ValueError(
            f"checkpoint: {source} lacks {lacking[0]!r}, a tensor of the model ({_more(lacking)} like it)"
        )


def _more(names: list[str]) -> str:
    return f"{len(names) - 1} more" if len(names) > 1 else "none"
