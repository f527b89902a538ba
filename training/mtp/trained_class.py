"""The class of a stock model whose prediction layers are trained: it saves and loads them by their official names."""

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from deepseek_records.kept_mtp import KeepsMtp, add_mtp
from deepseek_training.mtp.mtp_loss import MtpLoss


class TrainsMtp(KeepsMtp):
    """What `train_mtp` adds to a model's class.

    Attributes:
        mtp_loss: The loss of the prediction layers.
        mtp_prefix: What their names begin with, with its dot.
    """

    mtp_loss: MtpLoss
    mtp_prefix: str

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Save as transformers does, and the prediction layers beside.

        Args:
            save_directory: The folder.
            is_main_process: Whether this process writes.
            **kwargs: As for `transformers.PreTrainedModel.save_pretrained`.
        """
        save = super(KeepsMtp, self).save_pretrained  # type: ignore[misc]  # KeepsMtp would add those of the source
        if vars(self).get("_hf_peft_config_loaded", False):
            save(save_directory, is_main_process=is_main_process, **kwargs)
            return
        given = kwargs.pop("state_dict", None)
        tensors: Mapping[str, torch.Tensor] = self.state_dict() if given is None else given  # type: ignore[attr-defined]
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(self.mtp_prefix)}
        save(save_directory, is_main_process=is_main_process, state_dict=own, **kwargs)
        if is_main_process:
            held = {"layers." + n.removeprefix(self.mtp_prefix): t for n, t in tensors.items() if n not in own}
            add_mtp(Path(save_directory), self.mtp_loss.names.split(self.mtp_loss.built, held))

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load as torch does, and take the official names too: `Trainer` resumes by this.

        Args:
            state_dict: In either form; a hook of each layer fuses its experts.
            *args: As for `torch.nn.Module.load_state_dict`.
            **kwargs: Likewise.
        """
        names = {
            official: self.mtp_prefix + name.removeprefix("layers.")
            for name, official in self.mtp_loss.names.official.items()
        }
        renamed = {names.get(name, name): tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(renamed, *args, **kwargs)  # type: ignore[misc]

    def _get_candidate_generator(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if generation_config.use_mtp:
            raise ValueError(
                "use_mtp: True is not allowed for a model that trains multi-token prediction, for transformers reads "
                "the layers from the checkpoint; expected one loaded from where this one is saved"
            )
        return super()._get_candidate_generator(generation_config, *args, **kwargs)  # type: ignore[misc]


def make_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return a model's class with `TrainsMtp` in it, under the same name.

    Args:
        cls: The class of a model whose prediction layers are kept.
    """
    forward = _noting_labels(cls.forward)
    return type(
        cls.__name__, (TrainsMtp, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__, "forward": forward}
    )


def _noting_labels(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Note the labels, for PEFT calls `forward` past the model's hooks."""

    @functools.wraps(forward)
    def noting(self: TrainsMtp, *args: Any, **kwargs: Any) -> Any:
        self.mtp_loss.labels = kwargs.get("labels")
        return forward(self, *args, **kwargs)

    return noting
