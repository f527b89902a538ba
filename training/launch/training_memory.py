"""What a training holds at its most on one device, by part.

Weights, gradients and AdamW's moments are arithmetic. What a forward pass keeps for the backward one depends on the
model's code, so it is counted: a copy of the model runs over two short rows, and autograd is asked for what it kept.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from deepseek_records.activation_checkpointing import disable_checkpointing
from deepseek_records.decoder_layers import decoder_layers
from deepseek_training.launch.expert_buffers import ExpertBuffers, count_buffers
from deepseek_training.launch.step_time import is_timeable, random_batch
from modeling_deepseek.training_pass import set_accumulation_steps

_FP32 = 4
# Two moments in fp32.
_ADAMW_BYTES = 8
# At once in the backward pass of transformers' loss: log-softmax, its gradient and that of the logits, in fp32.
_LOSS_BYTES = 3 * _FP32
# Tokens of the two rows that are counted; the difference is what each token takes.
_LENGTHS = (32, 96)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes at a training's most.

    Attributes:
        weights: As they lie in memory.
        gradients: Of what is trained.
        moments: AdamW's two.
        activations: Kept for the backward pass, and casts of weights under autocast.
        logits: What the loss takes.
        buffers: What layers of experts take in a pass beside that.
        update: What AdamW needs beside all of that while it updates the largest parameter.
        is_accumulated: Whether gradients of an earlier pass lie there while a pass keeps its activations.
    """

    weights: float
    gradients: float
    moments: float
    activations: float
    logits: float
    buffers: ExpertBuffers
    update: float
    is_accumulated: bool

    @property
    def total(self) -> float:
        """The most at any time: activations go as gradients come, and all are gone when the optimizer steps."""
        on_the_way = self.activations + self.buffers.pages + self.buffers.pooled
        on_the_way += max(self.logits, self.buffers.passing)
        stepping = self.gradients + self.update + self.buffers.idle
        most = max(on_the_way + (self.gradients if self.is_accumulated else 0), stepping)
        return self.weights + self.moments + most


@dataclass(frozen=True)
class KeptBytes:
    """What one pass keeps for its backward pass.

    Attributes:
        layers: Bytes per token of each decoder layer.
        rest: Bytes per token outside of them, without the logits.
        fixed: Bytes that do not grow with the tokens.
        layer_input: Bytes per token of what goes into a layer.
    """

    layers: tuple[float, ...]
    rest: float
    fixed: float
    layer_input: float

    def total(self, num_tokens: int, *, is_checkpointed: bool) -> float:
        """Return the bytes of a pass.

        Args:
            num_tokens: Of the pass.
            is_checkpointed: Whether only each layer's input is kept, and one layer at a time computed again.
        """
        per_token = self.rest + sum(self.layers)
        if is_checkpointed:
            per_token = self.rest + len(self.layers) * self.layer_input + max(self.layers, default=0.0)
        return self.fixed + per_token * num_tokens


def estimate_training(
    model: PreTrainedModel,
    num_tokens: int,
    *,
    trained: int,
    is_bf16: bool,
    is_checkpointed: bool,
    is_accumulated: bool,
) -> TrainingMemory:
    """Return what a training of a model needs on a device that holds all of it.

    Args:
        model: Left as it is; of one over 1 GiB, on the meta device or split over processes, activations are about 20
            values of the hidden width per layer and token.
        num_tokens: Of one forward pass.
        trained: Parameters that the training moves.
        is_bf16: Whether passes run under bf16 autocast.
        is_checkpointed: Whether activations are computed again.
        is_accumulated: Whether an optimizer step has more than one pass.
    """
    config = model.config.get_text_config()
    parameters = list({id(parameter): parameter for parameter in model.parameters()}.values())
    moved = [parameter.numel() for parameter in parameters if parameter.requires_grad]
    if is_timeable(model):
        kept = count_kept(model, is_bf16=is_bf16)
    else:
        width = _FP32 * config.hidden_size
        kept = KeptBytes((20.0 * width,) * config.num_hidden_layers, 0.0, 0.0, width)
    return TrainingMemory(
        weights=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        gradients=_FP32 * trained,
        moments=_ADAMW_BYTES * trained,
        activations=kept.total(num_tokens, is_checkpointed=is_checkpointed),
        logits=_LOSS_BYTES * config.vocab_size * num_tokens,
        buffers=count_buffers(
            model,
            num_tokens,
            is_bf16=is_bf16,
            is_checkpointed=is_checkpointed,
            is_accumulated=is_accumulated,
        ),
        update=2 * _FP32 * max(moved, default=0),
        is_accumulated=is_accumulated,
    )


def count_kept(model: PreTrainedModel, *, is_bf16: bool) -> KeptBytes:
    """Return what a pass keeps per token, counted on a copy of the model.

    Args:
        model: Left as it is, and so is the random state.
        is_bf16: Whether the pass runs under bf16 autocast.
    """
    with torch.random.fork_rng():
        twin = copy.deepcopy(model).train()
        disable_checkpointing(twin)
        set_accumulation_steps(twin, 1)
        layers = list(decoder_layers(twin).values())
        short, long = (_count(twin, layers, length, is_bf16=is_bf16) for length in _LENGTHS)
    step = _LENGTHS[1] - _LENGTHS[0]
    per_token = [(more - less) / step for less, more in zip(short, long, strict=True)]
    fixed = sum(short) - _LENGTHS[0] * sum(per_token)
    width = twin.config.get_text_config().hidden_size * next(twin.parameters()).element_size()
    return KeptBytes(tuple(per_token[1:]), per_token[0], max(0.0, fixed), width)


def _count(twin: PreTrainedModel, layers: list[nn.Module], length: int, *, is_bf16: bool) -> list[float]:
    """Bytes that are kept outside of the layers, and in each of them."""
    batch = {name: value.to(twin.device) for name, value in random_batch(twin, 1, length).items()}
    vocabulary = twin.config.get_text_config().vocab_size
    known = {value.untyped_storage().data_ptr() for value in (*twin.parameters(), *twin.buffers())}
    found: list[dict[int, torch.Tensor]] = [{} for _ in range(1 + len(layers))]
    inside = 0

    def note(tensor: torch.Tensor) -> torch.Tensor:
        is_logits = inside == 0 and tensor.shape[-1:] == (vocabulary,)
        storage = tensor.untyped_storage().data_ptr()
        if not is_logits and storage not in known and not any(storage in one for one in found):
            found[inside][storage] = tensor  # kept, or its place would be taken by another
        return tensor

    @contextmanager
    def watched() -> Iterator[None]:
        def enter(place: int) -> None:
            nonlocal inside
            inside = place

        handles: list[Any] = []
        for place, layer in enumerate(layers, 1):
            handles.append(layer.register_forward_pre_hook(lambda *_, place=place: enter(place)))
            handles.append(layer.register_forward_hook(lambda *_: enter(0)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with watched(), hooks, torch.autocast(twin.device.type, torch.bfloat16, enabled=is_bf16):
        twin(**batch)
    return [float(sum(t.untyped_storage().nbytes() for t in one.values())) for one in found]
