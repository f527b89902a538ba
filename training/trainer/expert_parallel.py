"""A model whose experts are split over processes, by transformers' expert parallelism.

The stages call it where a recipe sets `expert_parallel_size`. Each process keeps some experts whole and its part of
everything else; tokens travel to the experts they chose. Surprising: transformers (5.23) splits a model only while
loading it, so it is saved once more first; and it cannot train one whose embedding is also its head (the losses drift
from the second step on), which is refused here.
"""

import shutil
from pathlib import Path

import torch
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
from transformers.distributed import DistributedConfig


def place_model(
    model: PreTrainedModel | PeftModel, size: int, folder: Path, args: TrainingArguments
) -> PreTrainedModel | PeftModel:
    """Return a loaded model where it is trained: split over processes, or on this one's device.

    Args:
        model: The model, whole and equal in every process.
        size: As for `split_experts`.
        folder: As for `split_experts`.
        args: The trainer's arguments.
    """
    return model.to(args.device) if size == 1 else split_experts(model, size, folder, args)


def split_experts(model: PreTrainedModel, size: int, folder: Path, args: TrainingArguments) -> PreTrainedModel:
    """Return the same model, each process holding its share.

    Args:
        model: The model, whole and equal in every process.
        size: Processes that share one set of experts.
        folder: Where the whole model lies while it is read again.
        args: The trainer's arguments.

    Raises:
        ValueError: The model or the number of processes does not allow it.
    """
    check_expert_parallel(model.config, size, args.world_size)
    path = folder / "unsplit"
    if args.process_index == 0:
        model.save_pretrained(path)
    torch.distributed.barrier()
    layout = DistributedConfig(fsdp_size=args.world_size, ep_size=size, ep_implementation="fused_moe")
    split = type(model).from_pretrained(path, config=model.config, dtype=model.dtype, distributed_config=layout)
    torch.distributed.barrier()
    if args.process_index == 0:
        shutil.rmtree(path)
    return split


def reshard(model: torch.nn.Module) -> None:
    """Let a split model hold its own parts again, as an optimizer must find them.

    After a pass without gradients FSDP2 (torch 2.13) leaves the outermost parameters whole, in other tensors: an
    optimizer made then would hold these, and never train embedding, last norm and head.

    Args:
        model: Measured before, or not split at all.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def check_expert_parallel(config: PreTrainedConfig, size: int, num_processes: int) -> None:
    """Raise a one-line ValueError unless a model's experts can be split.

    Args:
        config: The model's.
        size: Processes that share one set of experts.
        num_processes: Of the training.
    """
    got = f"expert_parallel_size: got {size}"
    if num_processes % size:
        raise ValueError(f"{got}, expected a divisor of the number of processes, {num_processes}")
    if config.num_experts % size:
        raise ValueError(f"{got}, expected a divisor of the model's number of experts, {config.num_experts}")
    if config.tie_word_embeddings:
        raise ValueError(f"{got}, expected 1 with tied embeddings, which transformers trains wrongly there")
