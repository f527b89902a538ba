"""Multi-token prediction weights that a checkpoint holds and the model has no layers for, carried to the next save.

`DeepseekPreTrainedModel` fills it while loading with `mtp_loss_coef=0` and empties it into every checkpoint it writes,
so that fine-tuning a released model does not lose its draft layers. They are plain tensors, no part of the
model, hence in no optimizer, parameter count, adapter or balance figure.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open

from .checkpoint_check import StoredTensor
from .fp8_checkpoint import dequantize_blocks

# Released checkpoints repeat these in each layer; they are the model's own, and would be stale after training.
_COPIES = re.compile(r"^(embed_tokens|shared_head\.head)\.")
_SCALE = "_scale_inv"


def mtp_part(name: str, config: Any) -> str | None:
    """Return what follows the layer's number in the name of a multi-token prediction weight; None for any other.

    Args:
        name: A tensor's name in a checkpoint.
        config: The model's configuration.
    """
    match = re.match(r"^(?:model\.)?layers\.(\d+)\.(.*)$", name)
    first = config.num_hidden_layers
    is_mtp = match is not None and first <= int(match[1]) < first + config.num_nextn_predict_layers
    return match[2] if is_mtp else None


@torch.no_grad()
def read_carried(
    tensors: Mapping[str, StoredTensor], config: Any, dtype: torch.dtype, block_size: tuple[int, int] | None
) -> dict[str, torch.Tensor]:
    """Return a checkpoint's multi-token prediction weights, by names from ``layers.`` on; on one process a machine.

    Args:
        tensors: What the checkpoint's files hold.
        config: The model's configuration.
        dtype: Of the model.
        block_size: Of FP8 weights.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        return {}  # Only the first saves, and V3's would be 28 GB a process.
    carried = {}
    for name, stored in tensors.items():
        part = mtp_part(name, config)
        if part is None or _COPIES.match(part) or name.endswith(_SCALE):
            continue
        # Cloned, for the file may be overwritten by the very checkpoint they are carried to.
        tensor = _read(stored, name)
        if name + _SCALE in tensors:
            tensor = dequantize_blocks(tensor, _read(tensors[name + _SCALE], name + _SCALE), block_size, dtype)
        carried[name.removeprefix("model.")] = _cast(name, tensor, dtype).clone()
    return carried


def with_carried(
    state_dict: Mapping[str, torch.Tensor], carried: Mapping[str, torch.Tensor], prefix: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return a state dict with the carried weights added.

    Args:
        state_dict: The model's.
        carried: From `read_carried`.
        prefix: Of the decoder's names, ``"model."`` or nothing.
        dtype: Of the model as it is saved.
    """
    return {**{prefix + name: _cast(name, tensor, dtype) for name, tensor in carried.items()}, **state_dict}


def _read(stored: StoredTensor, name: str) -> torch.Tensor:
    with safe_open(stored.path, framework="pt") as file:
        return file.get_tensor(name)


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    keeps = not tensor.is_floating_point() or name.endswith(("e_score_correction_bias", "share.state"))
    return tensor if keeps else tensor.to(dtype)
