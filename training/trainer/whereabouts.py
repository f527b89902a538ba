"""Where each process of a training is, for the line that names the one that hangs.

Each notes the decoder layer that it entered last. A thread tells the launcher's store now and then, since a process
that hangs cannot be asked. One that waited in vain says so there too: who does not is who it waited for.
"""

import os
import threading
import time
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deepseek_records.decoder_layers import decoder_layers

# How long one that waited in vain looks for the others who did.
_OTHERS_S = 2.0
_BETWEEN, _AFTER = "between two steps", "the loss or the backward pass"


class Whereabouts(TrainerCallback):
    """Notes and tells the step and the layer of this process.

    Args:
        model: Its decoder layers are noted.
        args: The trainer's arguments, which know the processes and how long they wait for one another.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments) -> None:
        self._rank, self._world_size = args.process_index, args.world_size
        self._period_s = min(30.0, max(0.5, args.ddp_timeout / 20))
        self._step, self._place, self._told = 0, _BETWEEN, ""
        self._lock, self._is_over = threading.Lock(), threading.Event()
        self._store = _launchers_store()
        for name, layer in decoder_layers(model).items():
            layer.register_forward_pre_hook(lambda *_, name=name: self._enter(name))
            layer.register_forward_hook(lambda *_: self._enter(_AFTER))

    def _enter(self, place: str) -> None:
        self._place = place

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to tell."""
        if self._store is not None:
            threading.Thread(target=self._tell, daemon=True).start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the step."""
        self._step, self._place = state.global_step + 1, "what comes before the first layer"

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note that it is over."""
        self._place = _BETWEEN

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell no more."""
        self._is_over.set()

    def _tell(self) -> None:
        while not self._is_over.wait(self._period_s):
            where = f"{self._place} of step {self._step}"
            if where == self._told:
                continue
            try:
                with self._lock:
                    self._store.set(f"at/{self._rank}", where)
            except RuntimeError:  # the launcher is gone
                return
            self._told = where

    def describe_missing(self) -> str | None:
        """Return which processes did not come, and where they were last; None if that cannot be said."""
        if self._store is None:
            return None
        try:
            with self._lock:
                self._store.set(f"waits/{self._rank}", "")
                time.sleep(_OTHERS_S)
                others = [rank for rank in range(self._world_size) if not self._store.check([f"waits/{rank}"])]
                last = [self._last(rank) for rank in others]
        except RuntimeError:
            return None
        if not others:
            return None
        text = ", ".join(f"process {rank}{place}" for rank, place in zip(others[:8], last, strict=False))
        return text if len(others) <= 8 else f"{text} and {len(others) - 8} more"

    def _last(self, rank: int) -> str:
        return f" (last seen in {self._store.get(f'at/{rank}').decode()})" if self._store.check([f"at/{rank}"]) else ""


def _launchers_store() -> Any:
    """A connection of its own to the store of torchrun or `accelerate launch`; None under another launcher."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = torch.distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=30)
    )
    return torch.distributed.PrefixStore(f"whereabouts-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
