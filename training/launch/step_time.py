"""How long a step takes on this machine: a few passes of a copy of the model, before the training begins.

The copy and a forked random state leave the training bit for bit as it would be without the measurement.
"""

import copy
import time
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from modeling_deepseek.training_pass import set_accumulation_steps

MOST_BYTES = 2**30  # a copy of a larger model may not fit beside it
MOST_TOKENS_ON_A_CPU = 2048  # of a timed pass, which would take minutes with more


def time_passes(
    model: PreTrainedModel,
    batch: dict[str, Any],
    *,
    num_passes: float,
    device: torch.device,
    is_bf16: bool = False,
) -> float | None:
    """Return the seconds of an optimizer step of so many forward and backward passes; None for a model over 1 GiB.

    Args:
        model: Left as it is.
        batch: Keyword arguments of one pass, with labels.
        num_passes: Passes per optimizer step.
        device: Where the training will run.
        is_bf16: Whether it runs under bf16 autocast.
    """
    if not is_timeable(model):
        return None
    batch = {name: value.to(device) for name, value in batch.items()}
    with torch.random.fork_rng(), torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
        twin = copy.deepcopy(model).to(device).train()
        set_accumulation_steps(twin, 1)
        seconds = []
        for _ in range(2):  # the first also builds what later passes reuse
            started = time.perf_counter()
            twin(**batch).loss.backward()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return min(seconds) * num_passes


def is_timeable(model: PreTrainedModel) -> bool:
    """Return whether a copy may be made of a model to time it: it is small, and whole in this process."""
    is_split = any(isinstance(module, FSDPModule) for module in model.modules())
    is_split = is_split or any(isinstance(parameter, DTensor) for parameter in model.parameters())
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return model.device.type != "meta" and not is_split and size < MOST_BYTES


def timed_rows(batch_size: int, length: int, device: torch.device) -> int:
    """Return how many rows of a batch are timed; the time of all is in proportion.

    Args:
        batch_size: Rows of a pass.
        length: Tokens per row.
        device: Where they are timed.
    """
    return batch_size if device.type != "cpu" else max(1, min(batch_size, MOST_TOKENS_ON_A_CPU // length))


def random_batch(model: PreTrainedModel, batch_size: int, length: int) -> dict[str, torch.Tensor]:
    """Return blocks of random tokens, for a timing.

    Args:
        model: For its vocabulary.
        batch_size: Blocks.
        length: Tokens per block.
    """
    generator = torch.Generator().manual_seed(0)
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(size, (batch_size, length), generator=generator)
    return {"input_ids": ids, "labels": ids}
