"""A model whose experts are split over processes, by transformers' expert parallelism.

`pretrain` and `adapt` call `split_experts` where a recipe sets `expert_parallel_size`. Each process keeps some experts
whole and its part of everything else; tokens travel to the experts they chose. Surprising: transformers (5.23) splits
a model only while loading it, so it is saved once more first; and it can neither resume one nor train one whose
embedding is also its head (the losses drift from the second step on), which is refused here.
"""

import shutil
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
from transformers.distributed import DistributedConfig


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
