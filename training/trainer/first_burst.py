"""Where a training's numbers first stopped being finite: process, step and layer.

One process's NaN is every process's after the next optimizer step, and a log line comes later still. `FirstBurst`
looks at what every decoder layer gives in every training pass and notes the first step at which it was not finite, on
the device, which is asked only once the log shows that the training has diverged. So the earliest step of any process
names the one in which it began.
"""

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deepseek_records.decoder_layers import decoder_layers

# Of a layer that was finite at every step.
_NEVER = 2**62


class FirstBurst(TrainerCallback):
    """Notes when each decoder layer's output first was not finite.

    Args:
        model: Its decoder layers are looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = decoder_layers(model)
        self.names = list(layers)
        device = next(model.parameters()).device
        self.first = torch.full((max(1, len(self.names)),), _NEVER, dtype=torch.int64, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        for place, layer in enumerate(layers.values()):
            layer.register_forward_hook(lambda _, __, output, place=place: self._look(place, output))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note which step begins."""
        self.step.fill_(state.global_step + 1)

    @torch.no_grad()
    def _look(self, place: int, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        values = output if isinstance(output, torch.Tensor) else output[0]
        if values.requires_grad:
            step = torch.where(values.isfinite().all(), _NEVER, self.step)
            self.first[place] = torch.minimum(self.first[place], step)

    def describe(self) -> str | None:
        """Return process, step and layer of the first output that was not finite; all processes call it."""
        tables = [self.first]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            tables = [torch.empty_like(self.first) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(tables, self.first)
        whole = torch.stack(tables)
        step = int(whole.min())
        if step == _NEVER:
            return None
        processes = (whole.min(1).values == step).nonzero().flatten().tolist()
        layer = self.names[int((whole[processes[0]] == step).nonzero()[0])]
        if len(tables) == 1:
            return f"first in the output of {layer} at step {step}"
        where = "every process" if len(processes) == len(tables) else f"process {', '.join(map(str, processes))}"
        return f"first in the output of {layer} in {where} at step {step}"
