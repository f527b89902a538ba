"""Multi-token prediction layers that transformers drops on loading, kept for every later save of a stock model.

DeepSeek-V3, GLM-4-MoE and many more families drop these weights: only `generate(use_mtp=True)` reads them, from the
checkpoint that the model was loaded from. A fine-tuned model is saved without them and drafts no more. `keep_mtp`
makes `save_pretrained` copy them from the source, byte for byte under their official names; `load_model` calls it, so
every stage and `merge` keeps them. Our own class carries them itself.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MTP_FILE = "model-mtp.safetensors"
# Released checkpoints repeat these in each layer; they are the model's own, and would be stale after training.
_COPIES = re.compile(r"\.(embed_tokens|shared_head\.head)\.")


class KeepsMtp:
    """What `keep_mtp` adds to a model's class.

    Attributes:
        mtp_files: The source's file by tensor name.
    """

    mtp_files: dict[str, Path]

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Save as transformers does, and the kept weights beside.

        Args:
            save_directory: The folder.
            is_main_process: Whether this process writes.
            **kwargs: As for `transformers.PreTrainedModel.save_pretrained`.
        """
        folder = Path(save_directory)
        is_adapter = vars(self).get("_hf_peft_config_loaded", False)
        if is_adapter or not is_main_process:
            super().save_pretrained(folder, is_main_process=is_main_process, **kwargs)  # type: ignore[misc]
            return
        own = {path.parent.resolve() for path in self.mtp_files.values()} == {folder.resolve()}
        early = read_mtp(self.mtp_files) if own else None  # before they are written over
        super().save_pretrained(folder, is_main_process=True, **kwargs)  # type: ignore[misc]
        add_mtp(folder, read_mtp(self.mtp_files) if early is None else early)


def keep_mtp(model: PreTrainedModel, source: str | os.PathLike[str] | None = None) -> bool:
    """Let a stock model's saves hold the multi-token prediction weights of the checkpoint it was loaded from.

    Args:
        model: Loaded by an Auto class; nothing of it is changed but what `save_pretrained` writes.
        source: That checkpoint; None: where the model says it is from.

    Returns:
        Whether there are such weights.

    Raises:
        ValueError: They are stored in FP8, and the model is not.
    """
    if "mtp_files" in vars(model) or hasattr(type(model), "_carries_mtp"):
        return True
    files = mtp_files(model, model.config.name_or_path if source is None else source)
    if not files:
        return False
    scales = [name for name in files if name.endswith("_scale_inv")]
    if scales and not vars(model).get("is_quantized", False):
        raise ValueError(f"mtp: got {scales[0]}, expected no FP8 weights; convert the checkpoint to bf16 first")
    cls = type(model)
    patterns = sorted({rf"layers\.{number}\." for number in map(_layer_number, files) if number is not None})
    if not isinstance(model, KeepsMtp):  # it is where the class of such a model has loaded it
        # Instead of a function on the instance, which a copy of the model would share.
        model.__class__ = type(cls.__name__, (KeepsMtp, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
    # By these `use_mtp` finds the layers; a class names those of the released sizes only.
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *patterns}
    model.mtp_files = files
    return True


def mtp_files(model: PreTrainedModel, source: str | os.PathLike[str]) -> dict[str, Path]:
    """Return where a checkpoint's multi-token prediction weights lie, by name; empty where there are none.

    Args:
        model: Tells how many layers are its own.
        source: A folder, or a Hub id that has been downloaded.
    """
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(source), local_files_only=True))
        except (OSError, ValueError):  # a name that is neither a folder nor in the cache
            return {}
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if num_layers is None:
        return {}
    if (folder / _INDEX).is_file():
        weight_map = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
    elif (folder / _SINGLE).is_file():
        with safe_open(folder / _SINGLE, framework="pt") as file:
            weight_map = dict.fromkeys(file.keys(), _SINGLE)
    else:
        return {}
    return {
        name: folder / file
        for name, file in weight_map.items()
        if _is_mtp(name, num_layers) and not _COPIES.search(name)
    }


def _is_mtp(name: str, num_layers: int) -> bool:
    if re.match(r"(model\.)?mtp\.", name):
        return True
    number = _layer_number(name)
    return number is not None and number >= num_layers


def _layer_number(name: str) -> int | None:
    match = re.match(r"(?:model\.)?(?:language_model\.)?layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def read_mtp(files: dict[str, Path]) -> dict[str, torch.Tensor]:
    """Return the tensors of `mtp_files`.

    Args:
        files: By name.

    Raises:
        FileNotFoundError: The source is no longer there.
    """
    tensors = {}
    for path in sorted(set(files.values())):
        if not path.is_file():
            raise FileNotFoundError(f"mtp: {path} is gone, from which the prediction layers were to be kept")
        with safe_open(path, framework="pt") as file:
            for name in (name for name, place in files.items() if place == path):
                tensors[name] = file.get_tensor(name).clone()
    return tensors


def add_mtp(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors into a file of their own and into the index, whole before anything points to it.

    Args:
        folder: A checkpoint without them.
        tensors: By their official names.
    """
    single, index = folder / _SINGLE, folder / _INDEX
    if single.is_file():  # of one file a checkpoint becomes two
        renamed = "model-00001-of-00001.safetensors"
        with safe_open(single, framework="pt") as file:
            weight_map = dict.fromkeys(file.keys(), renamed)
        size = single.stat().st_size
    else:
        stored = json.loads(index.read_text(encoding="utf-8"))
        weight_map, size = stored["weight_map"], stored["metadata"]["total_size"]
    save_file(tensors, folder / _MTP_FILE, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(tensors, _MTP_FILE)
    size += sum(tensor.nbytes for tensor in tensors.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2, sort_keys=True)
    part = folder / (_INDEX + ".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(index)
    if single.is_file():
        single.rename(folder / renamed)
