"""What the checks look at: a checkpoint, and where given an adapter and a recipe.

Only headers are read of the weights, and the model is built without storage. `Subject.model` loads the weights, for
models up to `MOST_PARAMETERS`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deepseek_records.json_files import read_object
from deepseek_records.loading import auto_class_of, load_model, load_tokenizer, resolve_checkpoint
from modeling_deepseek.checkpoint_check import StoredTensor, read_headers
from modeling_deepseek.families import MoeLayer, find_moe_layers

# A model of this size is loaded and run within seconds on two CPU cores.
MOST_PARAMETERS = 60_000_000
OUR_TYPE = "deepseek_moe"


class NotCheckedError(Exception):
    """A check cannot be made here; the message says why."""


@dataclass(frozen=True)
class Finding:
    """A fault.

    Attributes:
        message: What is wrong, in one line.
        cure: What mends it, in one line.
    """

    message: str
    cure: str


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as PEFT saves it.

    Attributes:
        path: Its folder.
        config: ``adapter_config.json``.
        tensors: ``adapter_model.safetensors``.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """A set-up.

    Attributes:
        source: The checkpoint's folder, or a Hub id.
        raw_config: ``config.json`` as it is written; empty for a Hub id.
        config: The configuration as transformers reads it.
        tensors: What the checkpoint's files hold, by name; empty where they are not safetensors files here.
        adapter: None where none was given.
        recipe: Settings of the training; None where none were given.
        is_own_stage: Whether the training is a stage of `deepseek-moe`, which loads deepseek_v3 by our class.
    """

    source: str
    raw_config: Mapping[str, Any]
    config: PreTrainedConfig
    tensors: Mapping[str, StoredTensor]
    adapter: Adapter | None = None
    recipe: Mapping[str, Any] | None = None
    is_own_stage: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether the model is of `modeling_deepseek`."""
        return self.config.get_text_config().model_type == OUR_TYPE

    @property
    def settings(self) -> Mapping[str, Any]:
        """The recipe.

        Raises:
            NotCheckedError: None was given.
        """
        if self.recipe is None:
            raise NotCheckedError("needs --recipe")
        return self.recipe

    @property
    def trained_adapter(self) -> Adapter:
        """The adapter.

        Raises:
            NotCheckedError: None was given.
        """
        if self.adapter is None:
            raise NotCheckedError("needs --adapter")
        return self.adapter

    @property
    def headers(self) -> Mapping[str, StoredTensor]:
        """The checkpoint's tensors.

        Raises:
            NotCheckedError: The files are not at hand.
        """
        if not self.tensors:
            raise NotCheckedError("needs a local checkpoint in safetensors files")
        return self.tensors

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model without storage."""
        with torch.device("meta"):
            return auto_class_of(self.config).from_config(self.config)

    @cached_property
    def layers(self) -> list[MoeLayer]:
        """Its MoE layers."""
        return find_moe_layers(self.skeleton)

    @cached_property
    def num_parameters(self) -> int:
        """Its parameters."""
        return sum(parameter.numel() for parameter in self.skeleton.parameters())

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that lies with the model.

        Raises:
            NotCheckedError: There is none.
        """
        try:
            return load_tokenizer(self.source)
        except (FileNotFoundError, ValueError):
            raise NotCheckedError("the model has no tokenizer beside it") from None

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model with its weights, in fp32.

        Raises:
            NotCheckedError: It is too large to be run here.
        """
        if self.num_parameters > MOST_PARAMETERS:
            raise NotCheckedError(f"runs models of at most {MOST_PARAMETERS / 1e6:.0f} million parameters")
        return load_model(self.source, auto_class=type(self.skeleton), dtype=torch.float32)

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        """Return the fused experts tensors `[E, ...]` by name."""
        experts = {layer.experts for layer in self.layers if layer.experts is not None}
        return {
            f"{name}.{part}" if name else part: parameter
            for name, module in self.skeleton.named_modules()
            if module in experts
            for part, parameter in module.named_parameters(recurse=False)
            if parameter.ndim == 3
        }


def open_subject(
    name_or_path: str | Path,
    *,
    adapter: str | Path | None = None,
    recipe: Mapping[str, Any] | None = None,
    is_own_stage: bool = False,
) -> Subject:
    """Return the set-up of a checkpoint.

    Args:
        name_or_path: A checkpoint, a run folder of ours, or a Hub id.
        adapter: A folder that PEFT saved.
        recipe: Settings of the training, ours or those of transformers and TRL.
        is_own_stage: Whether the training is a stage of `deepseek-moe`.

    Raises:
        FileNotFoundError: There is no such checkpoint or adapter.
        ValueError: A file is damaged, or the model is not one for text.
    """
    source = resolve_checkpoint(name_or_path, marks=("config.json",))
    folder = Path(source)
    raw_config = read_object(folder / "config.json", "model") if folder.is_dir() else {}
    try:
        config = AutoConfig.from_pretrained(source)
    except (ValueError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"model: got {name_or_path}, expected one that transformers knows ({reason})") from None
    files = sorted(folder.glob("model*.safetensors")) if folder.is_dir() else []
    return Subject(
        source=source,
        raw_config=raw_config,
        config=config,
        tensors=read_headers(files),
        adapter=None if adapter is None else read_adapter(adapter),
        recipe=recipe,
        is_own_stage=is_own_stage,
    )


def read_adapter(folder: str | Path) -> Adapter:
    """Return an adapter that PEFT saved.

    Args:
        folder: Its folder.

    Raises:
        FileNotFoundError: It holds none.
        ValueError: A file is damaged.
    """
    path = Path(folder).expanduser()
    config_file, weights = path / "adapter_config.json", path / "adapter_model.safetensors"
    for file in (config_file, weights):
        if not file.is_file():
            raise FileNotFoundError(f"adapter: {path} holds no {file.name}; pass a folder that PEFT saved")
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"adapter: {weights} is damaged or cut short ({error})") from None
    return Adapter(path, read_object(config_file, "adapter"), tensors)


def number(settings: Mapping[str, Any], name: str) -> float:
    """Return a setting as a number, 0 where it is absent or null.

    Args:
        settings: A recipe.
        name: The setting.

    Raises:
        ValueError: It is not a number.
    """
    value = settings.get(name) or 0
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"recipe: {name}: got {value!r}, expected a number")
    return found
