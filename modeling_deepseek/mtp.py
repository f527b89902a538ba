"""Multi-token prediction: one more layer per depth, and the loss that trains it.

`DeepseekModel` builds the layers where `mtp_loss_coef` is above 0, and attaches the loss to its output. Weights of
such layers that a checkpoint holds and the model has no layers for are kept by `carried_mtp.py`.

Axes: B batch, S sequence, D hidden, k depth from 1.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from .configuration_deepseek import DeepseekConfig
from .decoder_layer import DeepseekDecoderLayer, make_norm
from .token_layout import TokenLayout
from .training_pass import TrainingPass


class DeepseekSharedHead(nn.Module):
    """The norm before the head that a multi-token prediction layer shares with the model; named as in checkpoints."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.norm = make_norm(config, config.hidden_size, config.rms_norm_eps)


class DeepseekMtpLayer(DeepseekDecoderLayer):
    """Multi-token prediction: one more layer, fed with what came before and the embedding of one more token.

    For depth k: `h' = block(eh_proj([enorm(embed(x_{i+k})), hnorm(h_i)]))`, and `head(norm(h'))` predicts x_{i+k+1}.

    Reference:
        DeepSeek-AI 2024, arXiv 2412.19437, section 2.2. The order of the two halves is the released weights'.
    """

    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.enorm = make_norm(config, config.hidden_size, config.rms_norm_eps)
        self.hnorm = make_norm(config, config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = DeepseekSharedHead(config)

    def forward(  # type: ignore[override]  # a layer of this kind cannot do without the embeddings
        self,
        hidden_states: torch.Tensor,
        training_pass: TrainingPass | None = None,
        *,
        inputs_embeds: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return hidden states for the head and for the next depth.

        Args:
            hidden_states: `[B, S, D]`, of the model or of the depth before.
            training_pass: As for `DeepseekDecoderLayer`.
            inputs_embeds: `[B, S, D]`, embeddings k tokens ahead.
            **kwargs: As for `DeepseekDecoderLayer`.

        Returns:
            `[B, S, D]`.
        """
        joined = torch.cat([self.enorm(inputs_embeds), self.hnorm(hidden_states)], dim=-1)
        return self.shared_head.norm(super().forward(self.eh_proj(joined), training_pass, **kwargs))


class PredictionInputs(NamedTuple):
    """What the prediction layers are trained on.

    Attributes:
        input_ids: `[B, S]` int64.
        labels: `[B, S]` int64, -100 where nothing is to be predicted; the tokens themselves where the caller has none.
        attention_mask: As given to the model.
        position_ids: `[B, S]` or `[1, S]`; None: 0, 1, 2, ...
        training_pass: Sequences and padding.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    training_pass: TrainingPass

    def targets(self, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens `depth + 1` ahead and where they are a target, both `[B, S]`.

        A token is not a target where it is masked by its label, belongs to another sequence than the position that
        predicts it, or lies behind the end of the row.
        """
        ahead = -depth - 1
        targets = self.labels.roll(ahead, 1)
        sequences = self.training_pass.layout.sequence_ids.view_as(self.input_ids)
        is_target = (sequences == sequences.roll(ahead, 1)) & (sequences >= 0) & (targets != -100)
        is_target[:, ahead:] = False  # roll has brought the row's first tokens here
        return targets, is_target


def prediction_loss(
    decoder: PreTrainedModel, head: nn.Module, hidden_states: torch.Tensor, inputs: PredictionInputs
) -> torch.Tensor:
    """Return the mean over depths and sequences of the cross-entropy k + 1 tokens ahead.

    Never across a sequence's end. Averaged over each sequence's tokens first, as in the paper: a mean over all tokens
    would depend on how a batch is divided into passes.

    Args:
        decoder: A `DeepseekModel` with prediction layers.
        head: The language-modeling head, `[..., D] -> [..., vocabulary]`.
        hidden_states: `[B, S, D]`, the decoder's last ones.
        inputs: The batch.

    Returns:
        Scalar, fp32.

    Reference:
        DeepSeek-AI 2024, arXiv 2412.19437, equations 24 and 25.
    """
    position_ids = inputs.position_ids
    if position_ids is None:
        position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device).unsqueeze(0)
    common = {
        # By position: transformers 5.24 calls the fourth argument `cache`, versions before it `past_key_values`.
        "attention_mask": create_causal_mask(
            decoder.config, hidden_states, inputs.attention_mask, None, position_ids=position_ids
        ),
        "position_ids": position_ids,
        "position_embeddings": decoder.rotary_emb(hidden_states, position_ids),
        "training_pass": inputs.training_pass,
    }
    layers = [functools.partial(layer, **common) for layer in decoder.layers[decoder.config.num_hidden_layers :]]
    return loss_over_depths(layers, decoder.embed_tokens, head, hidden_states, inputs)


def loss_over_depths(
    layers: Sequence[Callable[..., torch.Tensor]],
    embed: Callable[[torch.Tensor], torch.Tensor],
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden_states: torch.Tensor,
    inputs: PredictionInputs,
) -> torch.Tensor:
    """Return `prediction_loss` of layers of any make; those of other models call it too.

    Args:
        layers: By depth, `layer(hidden_states, inputs_embeds=...)`, all `[B, S, D]`.
        embed: The embedding.
        head: The language-modeling head, `[..., D] -> [..., vocabulary]`.
        hidden_states: `[B, S, D]`, the decoder's last ones.
        inputs: The batch.

    Returns:
        Scalar, fp32.
    """
    losses = []
    for depth, layer in enumerate(layers, start=1):
        hidden_states = layer(hidden_states, inputs_embeds=embed(inputs.input_ids.roll(-depth, 1)))
        targets, is_target = inputs.targets(depth)
        losses.append(_mean_cross_entropy(head, hidden_states, targets, is_target, inputs.training_pass.layout))
    return torch.stack(losses).mean()


def _mean_cross_entropy(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    is_target: torch.Tensor,
    layout: TokenLayout,
) -> torch.Tensor:
    """The cross-entropy averaged over each sequence's targets, then over sequences."""
    if torch.compiler.is_compiling():  # a number of targets that varies would break the graph
        logits, ids = head(hidden_states).float().flatten(0, 1), targets.masked_fill(~is_target, -100).flatten()
        token_losses = nn.functional.cross_entropy(logits, ids, reduction="none").unsqueeze(1)
    else:
        logits = head(hidden_states[is_target]).float()
        token_losses = logits.new_zeros(is_target.numel(), 1)
        token_losses[is_target.flatten(), 0] = nn.functional.cross_entropy(
            logits, targets[is_target], reduction="none"
        )
    predicting = layout._replace(sequence_ids=layout.sequence_ids.masked_fill(~is_target.flatten(), -1))
    return layout.mean_over_sequences(predicting.mean(token_losses).squeeze(1))


def ignored_mtp_keys(config: DeepseekConfig) -> list[str]:
    """Return patterns of checkpoint keys of multi-token prediction layers that the model has no place for.

    All of them if the layers are not built; else their copies of embedding and head, which are the model's own.
    """
    first = config.num_hidden_layers
    part = r"(embed_tokens|shared_head\.head)\." if config.num_mtp_modules else ""
    return [rf"layers\.{first + depth}\.{part}" for depth in range(config.num_nextn_predict_layers)]
