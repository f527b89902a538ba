"""Calibration text through a model one decoder layer after another, so that a layer can be changed before the next.

`awq` calls it. One pass over the whole model notes with which masks and positions each layer is called; from then on
only the hidden states are carried.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class LayerWalk:
    """The decoder layers of a model, and what goes through them.

    Args:
        model: A causal language model in evaluation mode.
        layers: Decoder layers in order; those that a forward pass does not call are left out.
        blocks: `[blocks, S]` token ids.
        batch_size: Blocks of a batch.

    Raises:
        ValueError: A layer does not go on from the one before.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, layers: list[nn.Module], blocks: Tensor, batch_size: int) -> None:
        self._calls: dict[nn.Module, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self.hidden: list[Tensor] = []
        self._last: Tensor | None = None
        handles = [layer.register_forward_pre_hook(self._see, with_kwargs=True) for layer in layers]
        handles += [layer.register_forward_hook(self._end) for layer in layers]
        try:
            for start in range(0, len(blocks), batch_size):
                self._last = None
                ids = blocks[start : start + batch_size].long().to(model.device)
                model(input_ids=ids, use_cache=False, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
        self.layers = list(self._calls)

    def _see(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor):
            raise ValueError("model: got decoder layers that are called without hidden states first")
        if not self._calls or layer is next(iter(self._calls)):
            self.hidden.append(hidden)
        elif self._last is None or hidden.data_ptr() != self._last.data_ptr():
            raise ValueError("model: got decoder layers that do not follow one another, expected a chain of them")
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        self._calls.setdefault(layer, []).append((args[1:], rest))

    def _end(self, _layer: nn.Module, _args: Any, output: Any) -> None:
        self._last = output[0] if isinstance(output, tuple) else output

    def run(self, layer: nn.Module) -> Iterator[Tensor]:
        """Run a layer on what has come to it; yields each batch's output.

        Args:
            layer: The next one.
        """
        for batch in range(len(self.hidden)):
            yield self.run_batch(layer, batch)

    @torch.no_grad()
    def run_batch(self, layer: nn.Module, batch: int) -> Tensor:
        """Return a layer's output on one batch.

        Args:
            layer: The next one.
            batch: Its place.
        """
        args, kwargs = self._calls[layer][batch]
        output = layer(self.hidden[batch], *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def go_on(self, layer: nn.Module) -> None:
        """Let what a layer gives be what comes to the next, and forget how it is called.

        Args:
            layer: The one that is done.
        """
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self.run_batch(layer, batch)
        del self._calls[layer]
