"""The loss of a stock model's prediction layers.

It is that of our own class, `modeling_deepseek/mtp.py`, and like there it is attached to the decoder's output: the
loss that a trainer logs is without it.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
from transformers.modeling_layers import MtpModel
from transformers.utils import logging

from deepseek_training.mtp.official_names import OfficialNames
from modeling_deepseek.auxiliary_loss import AttachLoss
from modeling_deepseek.mtp import PredictionInputs, loss_over_depths
from modeling_deepseek.token_layout import make_layout
from modeling_deepseek.training_pass import PassWeight, TrainingPass

logger = logging.get_logger(__name__)

# transformers' names of layers whose mask is one of attention; others take one of a convolution besides.
MASKED_LAYERS = ("full_attention", "sliding_attention")


class MtpLoss:
    """Computes the loss and attaches it, in training only.

    Args:
        built: What transformers builds; the model's own modules are its `layers` alone, for the rest is the model's.
        names: The layers' names in the checkpoint.
        coef: Weight of the loss.

    Attributes:
        labels: `[B, S]`, of the pass that runs; None where the caller has none.
        last: The loss of the last pass, without its weight.
    """

    def __init__(self, built: MtpModel, names: OfficialNames, coef: float) -> None:
        self.built, self.names, self.coef = built, names, coef
        self.pass_weight = PassWeight()
        self.labels: torch.Tensor | None = None
        self.last: torch.Tensor | None = None
        self._attention_mask: torch.Tensor | None = None
        built.create_masks_for_mtp_layer = self._masks  # transformers' own knows of no padding

    def note_labels(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the labels until the decoder has run; a pre-hook of the model, which other trainers' forwards pass.

        Args:
            model: The model.
            args: Of the call.
            kwargs: Likewise.
        """
        self.labels = kwargs.get("labels")

    def attach(self, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the decoder's output with the loss attached; a hook of the decoder.

        Args:
            decoder: The decoder.
            args: Of the call.
            kwargs: Likewise.
            output: What the decoder returns.
        """
        labels, self.labels = self.labels, None
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if not (decoder.training and torch.is_grad_enabled()) or input_ids is None or not self._trains():
            return output
        attention_mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        layout = make_layout(input_ids.shape, input_ids.device, attention_mask, position_ids)
        inputs = PredictionInputs(
            input_ids=input_ids,
            labels=input_ids if labels is None else labels,
            attention_mask=attention_mask,
            position_ids=position_ids,
            training_pass=TrainingPass(layout, self.pass_weight.take()),
        )
        loss = self._compute(decoder, output[0], inputs)
        self.last = loss.detach()
        hidden_states = AttachLoss.apply(output[0], loss * (self.coef * inputs.training_pass.loss_weight))
        if isinstance(output, tuple):
            return (hidden_states, *output[1:])
        output.last_hidden_state = hidden_states
        return output

    def _trains(self) -> bool:
        if any(isinstance(module, BaseTunerLayer) for module in self.built.layers.modules()):
            raise ValueError(
                "mtp: got an adapter on the prediction layers, expected none; pass "
                'exclude_modules=r".*mtp_layers.*" to LoraConfig'
            )
        if any(parameter.requires_grad for parameter in self.built.layers.parameters()):
            return True
        logger.warning_once("mtp: the prediction layers are frozen, as PEFT leaves them; their loss is off")
        return False

    def _compute(
        self, decoder: PreTrainedModel, hidden_states: torch.Tensor, inputs: PredictionInputs
    ) -> torch.Tensor:
        config, positions = self.built.config, inputs.position_ids
        config._attn_implementation = decoder.config._attn_implementation
        config._experts_implementation = decoder.config._experts_implementation
        self._attention_mask = inputs.attention_mask
        if positions is None:
            positions = torch.arange(hidden_states.shape[1], device=hidden_states.device).unsqueeze(0)
        layers: list[Callable[..., torch.Tensor]] = [
            functools.partial(self._run, depth, positions) for depth in range(len(self.built.layers))
        ]
        embed = decoder.get_input_embeddings()
        return loss_over_depths(layers, embed, self.built._project_to_logits, hidden_states, inputs)

    def _run(
        self, depth: int, positions: torch.Tensor, hidden_states: torch.Tensor, *, inputs_embeds: torch.Tensor
    ) -> torch.Tensor:
        return self.built.forward_layer(depth, hidden_states, positions, None, inputs_embeds=inputs_embeds)

    def _masks(
        self, layer_idx: int, inputs_embeds: torch.Tensor, cache: None, position_ids: torch.Tensor
    ) -> dict[str, Any]:
        make_mask = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[layer_types(self.built)[layer_idx]]
        # By position: transformers 5.24 calls the fourth argument `cache`, versions before it `past_key_values`.
        mask = make_mask(self.built.config, inputs_embeds, self._attention_mask, cache, position_ids=position_ids)
        return {"attention_mask": mask}


def layer_types(built: MtpModel) -> list[str]:
    """Return which mask each prediction layer takes, by transformers' names.

    Args:
        built: The layers.
    """
    types = getattr(built.config, "layer_types", None)
    return ["full_attention"] * len(built.layers) if types is None else list(types)
