"""Activation checkpointing by the name that the installed transformers has for it.

Since 5.23 it is ``activation_checkpointing``, and ``gradient_checkpointing`` warns; 5.17 knows the old name only.
Goes when `setup.cfg` asks for 5.23.
"""

import inspect
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

IS_RENAMED = hasattr(PreTrainedModel, "activation_checkpointing_enable")
_IS_SETTING_RENAMED = "activation_checkpointing" in inspect.signature(TrainingArguments).parameters


def checkpointing_setting(value: bool, **options: Any) -> dict[str, Any]:
    """Return the arguments of `TrainingArguments` that turn checkpointing on or off.

    Args:
        value: Whether activations are computed again.
        **options: For `torch.utils.checkpoint`, such as ``use_reentrant``.
    """
    name = "activation_checkpointing" if _IS_SETTING_RENAMED else "gradient_checkpointing"
    return {name: value, **({f"{name}_kwargs": options} if options else {})}


def enable_checkpointing(model: Any, options: dict[str, Any] | None = None) -> None:
    """Compute a model's activations again in the backward pass.

    Args:
        model: A transformers model, or a wrapper of one.
        options: For `torch.utils.checkpoint`, such as ``use_reentrant``.
    """
    (model.activation_checkpointing_enable if IS_RENAMED else model.gradient_checkpointing_enable)(options)


def disable_checkpointing(model: Any) -> None:
    """Keep a model's activations.

    Args:
        model: A transformers model, or a wrapper of one.
    """
    (model.activation_checkpointing_disable if IS_RENAMED else model.gradient_checkpointing_disable)()


def uses_checkpointing(model: Any) -> bool:
    """Return whether a model computes its activations again.

    Args:
        model: A transformers model, or a wrapper of one.
    """
    return bool(model.is_activation_checkpointing if IS_RENAMED else model.is_gradient_checkpointing)
