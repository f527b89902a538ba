"""Launching where the tensors are: Triton launches on the current GPU, whichever one the tensors are on.

Every function that launches kernels enters `on_device_of`. Without it a model spread over several GPUs would run the
second one's layers on the first, reading addresses that mean nothing there.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which kernels launch on the GPU of `tensor`; it does nothing for a CPU tensor.

    Args:
        tensor: Any of the launch's arguments.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
