"""The names of a stock model's prediction layers in its checkpoint, and in memory, where transformers builds them.

transformers' own way back from memory writes wrong names: its renamings serve several families, and reversed each of
them fires. So the names are taken from the checkpoint that was read, and only what changes tensors is reversed by
transformers.
"""

from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, revert_weight_conversion
from transformers.modeling_layers import MtpModel


class OfficialNames:
    """Both names of each tensor of the prediction layers.

    Args:
        layers: As transformers builds them.
        model: The model they belong to.
        names: Those of the checkpoint.

    Attributes:
        official: The checkpoint's name by that in `layers`, before experts are fused.
    """

    def __init__(self, layers: MtpModel, model: PreTrainedModel, names: Iterable[str]) -> None:
        conversions = layers.get_weight_conversions(model)
        renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
        self.official = {_rename(name, renamings): name for name in names}
        layers._weight_conversions = [one for one in conversions if isinstance(one, WeightConverter)]

    def check(self, layers: MtpModel) -> None:
        """Refuse layers whose tensors are not those of the checkpoint.

        Args:
            layers: Those of the constructor.

        Raises:
            ValueError: One is too many or missing.
        """
        odd = sorted(self._split(layers, layers.layers.state_dict(prefix="layers.")).keys() ^ self.official.keys())
        if odd:
            raise ValueError(f"mtp: got {odd[0]}, expected the tensors of the checkpoint and no others")

    def split(self, layers: MtpModel, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return tensors under their official names, fused experts one by one; copies on the CPU.

        Args:
            layers: Those of the constructor.
            state_dict: All of their tensors.
        """
        split = self._split(layers, state_dict)
        return {self.official[name]: tensor.detach().cpu().clone() for name, tensor in split.items()}

    def _split(self, layers: MtpModel, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return revert_weight_conversion(layers, dict(state_dict))


def _rename(name: str, renamings: Iterable[WeightRenaming]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name
