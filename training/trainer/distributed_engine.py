"""Which distributed engine a training runs under, and proof that it is the one asked for.

`accelerate launch --config_file` (files under ``launch/``) chooses: nothing or torchrun gives data parallelism, FSDP2
and DeepSpeed ZeRO-3 split the parameters. Without a GPU accelerate (1.15) turns FSDP into plain data
parallelism without a word, and leaves DeepSpeed believing in one process, each of which then reads the same data.
`prepare_engine` makes both engines real on a CPU, where they serve to try a recipe out, and `check_engine` refuses to
train under another engine than was asked for.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

LAUNCH_FOLDER = Path(__file__).parents[1] / "launch"


def launch_config(name: str) -> Path:
    """Return the accelerate configuration of an engine, for ``accelerate launch --config_file``.

    Args:
        name: ``fsdp2`` or ``zero3``.

    Raises:
        ValueError: There is none of that name.
    """
    path = LAUNCH_FOLDER / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in LAUNCH_FOLDER.glob("*.yaml")))
        raise ValueError(f"launch configuration: got {name!r}, expected one of {names}")
    return path


def requested_engine() -> DistributedType | None:
    """Return FSDP or DEEPSPEED if ``accelerate launch`` was told so, else None."""
    for engine in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        if os.environ.get(f"ACCELERATE_USE_{engine.value}", "false").lower() == "true":
            return engine
    return None


def refuse_fsdp(stage: str) -> None:
    """Refuse FSDP2 in a stage that was never held against one process under it.

    Args:
        stage: The command.

    Raises:
        ValueError: ``accelerate launch`` was told to use it.
    """
    engine = requested_engine()
    if engine is DistributedType.FSDP:
        raise ValueError(
            f"engine: got {engine.value}, expected torchrun or DeepSpeed ZeRO-3 for {stage}: with FSDP2 it was never "
            "held against one process"
        )


def refuse_split_adapter(lora_rank: int, stage: str) -> None:
    """Refuse LoRA under DeepSpeed, where adapters were never held against one process.

    Args:
        lora_rank: The recipe's.
        stage: The command.

    Raises:
        ValueError: There is an adapter, and ``accelerate launch`` was told to use DeepSpeed.
    """
    if lora_rank and requested_engine() is DistributedType.DEEPSPEED:
        raise ValueError(f"lora_rank: got {lora_rank}, expected 0 for {stage} under DeepSpeed")


def prepare_engine(timeout_s: int = 1800) -> dict[str, Any]:
    """Set up the process group that several processes need on a CPU; call it before `TrainingArguments`.

    Args:
        timeout_s: How long a process waits for the others.

    Returns:
        What to pass as `accelerator_config`; empty where accelerate needs no help.
    """
    engine, timeout = requested_engine(), timedelta(seconds=timeout_s)
    if torch.accelerator.is_available() or "LOCAL_RANK" not in os.environ:
        return {}
    if engine is DistributedType.DEEPSPEED:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if (
            not torch.distributed.is_initialized()
        ):  # DeepSpeed's own start knows no store, but takes a group that is there
            torch.distributed.init_process_group("gloo", timeout=timeout, **_store_of_this_attempt(timeout))
        PartialState(backend="gloo", timeout=timeout)
    elif engine is DistributedType.FSDP or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # `TrainingArguments` (5.23) has a process on a CPU wait as long as torch does by default.
        state = PartialState(cpu=True, timeout=timeout, **_store_of_this_attempt(timeout))
        if engine is DistributedType.FSDP:
            # Accelerate looks for an FSDP plugin only on this type; it never asks what the device is.
            state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    else:
        return {}
    return {"use_configured_state": True}


def _store_of_this_attempt(timeout: timedelta) -> dict[str, Any]:
    """Arguments of a process group that does not read addresses which processes before a restart have left.

    torchrun (torch 2.13) keeps its store over `--max-restarts`, so a process may look for one that is dead.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(host, port, is_master=False, timeout=timeout)
    named = torch.distributed.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return {"store": named, "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}


@contextlib.contextmanager
def building_as_configured(args: TrainingArguments) -> Iterator[None]:
    """Let a model be built whole in each process unless DeepSpeed's `zero3_init_flag` asks to split it at once.

    transformers (5.23) splits it whatever the flag says, and draws a split model's first weights in another order, so
    that a training would not start where that of one process does.

    Args:
        args: The trainer's arguments.
    """
    plugin = args.deepspeed_plugin
    if plugin is None or plugin.zero3_init_flag:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        plugin.set_deepspeed_weakref()


def check_engine(accelerator: Any) -> None:
    """Refuse another engine than ``accelerate launch`` was told to use.

    Args:
        accelerator: The trainer's.

    Raises:
        ValueError: It is another one.
    """
    engine, found = requested_engine(), accelerator.distributed_type
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if engine is not None and world_size > 1 and found is not engine:
        raise ValueError(f"accelerate launch: {engine.value} was asked for, but the trainer runs under {found.value}")
    known = accelerator.num_processes
    if known != world_size:
        raise ValueError(f"accelerate launch: {world_size} processes were started, but the trainer knows {known}")
