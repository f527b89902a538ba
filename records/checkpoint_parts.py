"""Weights that several processes wrote in parts, put together as an ordinary checkpoint with per-expert names.

A training that writes parts ends with it, and ``deepseek-moe export`` does the same to any such checkpoint, without
the processes that wrote it. One file's tensors are in memory at a time. In torch (2.13) a folder that
lacks a process's file reads as one of smaller tensors.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from deepseek_records.run_folder import write_json

_PART = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_GIB = 2**30
# Of what lies beside the weights: the configuration, the code of our classes, a tokenizer; no state of a training.
_STATES = ("complete.json", "written_by.json", "trainer_state.json")


def is_in_parts(folder: str | Path) -> bool:
    """Return whether several processes wrote a folder's weights, each its part.

    Args:
        folder: A checkpoint, or anything else.
    """
    return Path(folder).is_dir() and any(_PART.fullmatch(path.name) for path in Path(folder).iterdir())


def join_parts(source: str | Path, output: str | Path, *, most_gib: float = 4.0) -> int:
    """Write an ordinary checkpoint with the official per-expert names, and return the bytes of its weights.

    It is written beside the output under a temporary name, which is taken off at the end.

    Args:
        source: A folder for which `is_in_parts` holds.
        output: The folder to write, empty or absent.
        most_gib: Most weights in one file, and so in memory.

    Raises:
        FileExistsError: The output holds files.
        ValueError: A part is missing or damaged, or the tensors are not the model's.
    """
    source, output = Path(source), Path(output)
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"output: got {output}, expected an empty or absent folder")
    if (source / "adapter_config.json").is_file():
        raise ValueError(f"model: got {source}, an adapter in parts, expected a model; the run ends with its adapter/")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    stored = _stored(source, model)
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix in (".json", ".py", ".jinja", ".model") and path.name not in _STATES:
            shutil.copy2(path, partial)
    num_bytes = _write_weights(source, stored, model, partial, most_bytes=int(most_gib * _GIB))
    if output.exists():
        output.rmdir()
    os.replace(partial, output)
    return num_bytes


def _stored(source: Path, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The stored tensors that make up the model, on the meta device; each is known to be there with all its parts."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        found = HuggingFaceStorageReader(str(source)).read_metadata().state_dict_metadata
    except SafetensorError as error:
        raise ValueError(f"model: {source} holds a part that is damaged or cut short ({error})") from None
    stored = {}
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        parts = sum(chunk.sizes.numel() for chunk in found[name].chunks) if name in found else 0
        if parts != tensor.numel() or found[name].size != tensor.shape:
            raise ValueError(
                f"model: {source} holds {parts} of the {tensor.numel()} values of {name}, expected all; a process's "
                "part is missing"
            )
        stored[name] = torch.empty(tensor.shape, dtype=found[name].properties.dtype, device="meta")
    return stored


def _write_weights(
    source: Path, stored: dict[str, torch.Tensor], model: PreTrainedModel, output: Path, *, most_bytes: int
) -> int:
    """Write the files and, of several, their index; return the bytes of the tensors."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    groups = list(_grouped(stored.items(), most_bytes))
    names = [f"model-{row:05d}-of-{len(groups):05d}.safetensors" for row in range(1, len(groups) + 1)]
    file_of, num_bytes = {}, 0
    for group, name in zip(groups, names if len(groups) > 1 else ["model.safetensors"], strict=True):
        state = {key: torch.empty_like(tensor, device="cpu") for key, tensor in group.items()}
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(source)), no_dist=True)
        state = {key: tensor.contiguous() for key, tensor in revert_weight_conversion(model, state).items()}
        save_file(state, output / name, metadata={"format": "pt"})
        file_of.update(dict.fromkeys(state, name))
        num_bytes += sum(tensor.nbytes for tensor in state.values())
    if len(groups) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(file_of.items()))}
        write_json(output / "model.safetensors.index.json", index)
    return num_bytes


def _grouped(items: Iterable[tuple[str, torch.Tensor]], most_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """Consecutive tensors that together, or one alone, come up to so many bytes."""
    group: dict[str, torch.Tensor] = {}
    for name, tensor in items:
        if group and sum(one.nbytes for one in group.values()) + tensor.nbytes > most_bytes:
            yield group
            group = {}
        group[name] = tensor
    if group:
        yield group
