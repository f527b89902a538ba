"""A checkpoint as one ExecuTorch program (``.pte``) for phones, with the cache inside it.

`deepseek-moe export --to executorch` calls it. ExecuTorch plans memory ahead, so lengths are fixed: the program reads
one token per call and holds a cache of a fixed length, whose places are overwritten in turn. transformers' own helper
for ExecuTorch allocates keys and values of all heads and fails at latent attention, whose cache is narrower; here the
cache has the shape that the model itself writes. XNNPACK computes the products.
"""

import dataclasses
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from deepseek_serving.edge.decoder_graph import check_exportable
from deepseek_serving.edge.export_folder import CacheLayer, whole_folder, write_companions, write_report
from deepseek_serving.edge.measurement import Agreement, ProbeText
from deepseek_serving.edge.onnx_export import describe_cache, describe_model, traceable
from deepseek_serving.edge.packages import check_executorch

PROGRAM = "model.pte"
_MOST_DIFFERENCE = 1e-2


class StaticCacheDecoder(nn.Module):
    """One token in, its logits out; the cache is kept in buffers between calls.

    Args:
        model: A causal language model in fp32, in evaluation mode.
        length: Tokens that the cache holds.
        layers: Shapes of its layers.
    """

    def __init__(self, model: PreTrainedModel, length: int, layers: Sequence[CacheLayer]) -> None:
        super().__init__()
        self.model, self.length, self.num_layers = model, length, len(layers)
        for number, layer in enumerate(layers):
            self.register_buffer(f"keys_{number}", torch.zeros(1, layer.num_heads, length, layer.key_width))
            self.register_buffer(f"values_{number}", torch.zeros(1, layer.num_heads, length, layer.value_width))

    def forward(self, input_ids: Tensor, position: Tensor) -> Tensor:
        """Return the logits `[1, vocabulary]` behind a token.

        Args:
            input_ids: `[1, 1]` int64.
            position: `[1]` int64, its place in the text. A text begins at 0; what the cache holds behind is not read.
        """
        is_seen = torch.arange(self.length) <= position
        mask = torch.where(is_seen, 0.0, torch.finfo(torch.float32).min)[None, None, None]
        output = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position[None],
            past_key_values=_BufferCache(self, position),
            use_cache=True,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


class _BufferCache(Cache):
    """What transformers' attention updates: writes one place of the buffers and returns them whole."""

    def __init__(self, owner: StaticCacheDecoder, position: Tensor) -> None:
        super().__init__(layers=DynamicCache(config=owner.model.config).layers)
        self.owner, self.position = owner, position

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = (getattr(self.owner, f"{part}_{layer_idx}") for part in ("keys", "values"))
        keys.index_copy_(2, self.position, key_states)
        values.index_copy_(2, self.position, value_states)
        return keys, values


def export_executorch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: str | Path,
    *,
    texts: Sequence[str],
    cache_tokens: int | None = None,
    most_gathered_gib: float = 1.0,
) -> Agreement:
    """Write a model's program, its tokenizer and what was measured on it.

    Args:
        model: A causal language model in fp32.
        tokenizer: Its tokenizer.
        output: The folder to write, empty or absent.
        texts: What the program is measured on, held out from training.
        cache_tokens: Longest text, prompt included; None takes the model's context, at most 512.
        most_gathered_gib: The most memory for gathered experts' weights, in GiB.

    Returns:
        How far the program is from the model.

    Raises:
        ValueError: A model that cannot be expressed, or ExecuTorch is absent.
        FileExistsError: The folder holds files.
    """
    check_executorch()
    check_exportable(model, most_gathered_gib)
    context = model.config.max_position_embeddings
    length = min(context, 512) if cache_tokens is None else cache_tokens
    if not 1 <= length <= context:
        raise ValueError(f"--cache-tokens: got {length}, expected 1 to the model's context of {context}")
    with whole_folder(output) as folder:
        write_companions(folder, model, tokenizer)
        facts = dataclasses.replace(describe_model(model), context_length=length, prompt_chunk=1)
        write_program(model, folder / PROGRAM, length)
        program = ExecutorchDecoder(folder / PROGRAM)
        agreement = ProbeText(model, tokenizer, texts, most_tokens=1000, most_window=length).compare(program.read)
        if not agreement.largest_logit_difference <= _MOST_DIFFERENCE:  # also NaN
            raise ValueError(
                f"model: the program differs from the model by {agreement.largest_logit_difference:.2g}, expected "
                "rounding only"
            )
        readme = resources.files(__package__).joinpath("templates/executorch.md").read_text(encoding="utf-8")
        readme = readme.replace("{{measured}}", str(agreement)).replace("{{length}}", str(length))
        (folder / "README.md").write_text(readme.replace("{{model_type}}", facts.model_type), encoding="utf-8")
        measured = {PROGRAM: dataclasses.asdict(agreement)}
        write_report(folder, "executorch", facts, measured, ("torch", "transformers", "executorch"))
    return agreement


def write_program(model: PreTrainedModel, path: Path, length: int) -> None:
    """Trace a model and write its program.

    Args:
        model: A causal language model in fp32.
        path: The file.
        length: Tokens that the cache holds.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    needs_gradient = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)  # a cache written in place may have none
    try:
        with traceable(model):
            decoder = StaticCacheDecoder(model, length, describe_cache(model)).eval()
            program = torch.export.export(decoder, (torch.zeros(1, 1, dtype=torch.long), torch.tensor([1])))
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    finally:
        for parameter in needs_gradient:
            parameter.requires_grad_(True)
    path.write_bytes(lowered.buffer)


class ExecutorchDecoder:
    """Runs a program in ExecuTorch's own runtime.

    Args:
        path: The ``.pte`` file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: ExecuTorch is absent.
    """

    def __init__(self, path: Path) -> None:
        check_executorch()
        from executorch.runtime import Runtime

        if not path.is_file():
            raise FileNotFoundError(f"model: got {path}, expected an ExecuTorch program")
        # The program must outlive its method.
        self.program = Runtime.get().load_program(path)
        self.method = self.program.load_method("forward")

    def step(self, token: int, position: int) -> np.ndarray:
        """Return the logits `[vocabulary]` behind a token.

        Args:
            token: Its id.
            position: Its place in the text.
        """
        logits = self.method.execute([torch.tensor([[token]]), torch.tensor([position])])[0]
        row: np.ndarray = logits[0].numpy()
        return row.copy()  # the runtime writes the next one in its place

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits `[S, vocabulary]` of a text.

        Args:
            ids: `[S]`.
        """
        return np.stack([self.step(int(token), position) for position, token in enumerate(ids)])

    def generate(self, ids: Sequence[int], num_new: int) -> list[int]:
        """Return the greedy continuation.

        Args:
            ids: The prompt's token ids, at least one.
            num_new: New tokens.
        """
        text, logits = list(ids), self.read(np.array(ids))[-1]
        while True:
            text.append(int(logits.argmax()))
            if len(text) - len(ids) >= num_new:
                return text[len(ids) :]
            logits = self.step(text[-1], len(text) - 1)
