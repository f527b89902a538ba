"""Runs a small model once under activation checkpointing and compares both choices of its routers.

`model_checks.recomputed_routing` calls it.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError
from transformers import PreTrainedModel

from deepseek_records.activation_checkpointing import disable_checkpointing, enable_checkpointing
from deepseek_records.doctor.subject import NotCheckedError
from modeling_deepseek.families import find_moe_layers

ROWS, LENGTH = 2, 32


def share_of_changed_choices(model: PreTrainedModel, options: dict[str, Any]) -> float:
    """Return the share of tokens that go to other experts when their layer is run again; 1 where autograd notices.

    Args:
        model: With its weights; left in evaluation mode, without gradients.
        options: For the checkpointing, as in ``gradient_checkpointing_kwargs``.

    Raises:
        NotCheckedError: The model class does not support checkpointing.
    """
    if not model.supports_gradient_checkpointing:
        raise NotCheckedError("the model class does not support checkpointing")
    chosen: list[list[torch.Tensor]] = []
    handles = []
    for layer in find_moe_layers(model):
        seen: list[torch.Tensor] = []
        chosen.append(seen)
        handles.append(layer.router.register_forward_hook(_keep_choice(seen)))
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocabulary, (ROWS, LENGTH), generator=generator)
    model.train()
    enable_checkpointing(model, {"use_reentrant": False, **options})
    try:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    except CheckpointError:
        return 1.0
    finally:
        for handle in handles:
            handle.remove()
        disable_checkpointing(model)
        model.zero_grad(set_to_none=True)
        model.eval()
    pairs = [(seen[0], seen[1]) for seen in chosen if len(seen) == 2]
    if not pairs:
        return 0.0
    return max((one != other).any(-1).float().mean().item() for one, other in pairs)


def _keep_choice(seen: list[torch.Tensor]) -> Any:
    def keep(router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tensors = [part for part in output if isinstance(part, torch.Tensor)] if isinstance(output, tuple) else []
        integers = [part for part in tensors if not part.is_floating_point()]
        if integers:
            seen.append(integers[0].detach().flatten(0, -2).sort(-1).values)

    return keep
