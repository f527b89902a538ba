"""Weights that ZeRO-3 has split, whole in each process while completions are written or a model is saved.

Completions have other lengths in each process, so no weight can be fetched while they are written: all are gathered
before.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from accelerate import Accelerator
from torch import nn


def is_split(module: nn.Module) -> bool:
    """Whether ZeRO-3 has split a module's weights.

    Args:
        module: Any.
    """
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def load_whole(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Load whole weights into a model whose own may be split; every process has to come here.

    Args:
        model: Changed in place.
        weights: By name; what it lacks stays.
    """
    if not is_split(model):
        model.load_state_dict(weights, strict=False)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        model.load_state_dict(weights, strict=False)


@contextlib.contextmanager
def whole_weights(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Hold all weights of a model in each process for a while; every process has to come here.

    Args:
        model: Wrapped by the accelerator. Where nothing is split, nothing is done.
        accelerator: Which wrapped it.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        yield
        return
    import deepspeed
    from trl.models.utils import add_hooks, remove_hooks

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        remove_hooks(model)
        try:
            yield
        finally:
            add_hooks(model)
