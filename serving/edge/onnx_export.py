"""A checkpoint as ONNX graphs for onnxruntime: with and without a cache, weights in fp32 and in 8 bits.

`deepseek-moe export --to onnx` calls it. Batch, prompt and cache may have any length, so one graph with a cache reads
the prompt and writes the text. The experts are transformers' `batched_mm`, which gathers the weights of each token's
experts: that traces without a loop over tokens, also where the number of experts is dynamic.
"""

import dataclasses
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from deepseek_serving.edge.decoder_graph import PROMPT_CHUNK, DecoderGraph, check_exportable
from deepseek_serving.edge.export_folder import CacheLayer, ModelFacts, whole_folder, write_companions, write_report
from deepseek_serving.edge.int8_weights import quantize_graph
from deepseek_serving.edge.measurement import Agreement, ProbeText
from deepseek_serving.edge.onnx_decoder import OnnxDecoder, open_session, run_without_cache
from deepseek_serving.edge.packages import check_onnx_packages
from modeling_deepseek.families import find_moe_layers

GRAPHS = ("model.onnx", "model_int8.onnx", "model_without_cache.onnx", "model_without_cache_int8.onnx")
PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
_OPSET = 20
# Protocol Buffers' limit of one message is 2 GiB; the graph around the weights takes the rest.
_MOST_BYTES = 2 * 2**30 - 50 * 2**20
# Rounding stays far below this.
_MOST_DIFFERENCE = 1e-2


def export_onnx(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: str | Path,
    *,
    texts: Sequence[str],
    most_gathered_gib: float = 1.0,
) -> dict[str, Agreement]:
    """Write a model's four graphs, its tokenizer and what was measured on them.

    Args:
        model: A causal language model in fp32.
        tokenizer: Its tokenizer.
        output: The folder to write, empty or absent.
        texts: What the graphs are measured on, held out from training.
        most_gathered_gib: The most memory for gathered experts' weights, in GiB.

    Returns:
        How far each graph is from the model.

    Raises:
        ValueError: A model that the graphs cannot express, or a package that is absent.
        FileExistsError: The folder holds files.
    """
    check_onnx_packages()
    check_exportable(model, most_gathered_gib)
    check_size(model)
    with whole_folder(output) as folder:
        write_companions(folder, model, tokenizer)
        facts = describe_model(model)
        write_graphs(model, folder)
        measured = measure_graphs(folder, ProbeText(model, tokenizer, texts))
        readme = resources.files(__package__).joinpath("templates/onnx.md").read_text(encoding="utf-8")
        (folder / "README.md").write_text(fill_readme(readme, facts, measured), encoding="utf-8")
        plain = {name: dataclasses.asdict(agreement) for name, agreement in measured.items()}
        write_report(folder, "onnx", facts, plain, PACKAGES)
    return measured


def check_size(model: PreTrainedModel) -> None:
    """Refuse a model whose fp32 weights do not fit one ONNX file.

    Args:
        model: The model.

    Raises:
        ValueError: It is larger.
    """
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    if size > _MOST_BYTES:
        raise ValueError(
            f"model: got {size / 2**30:.1f} GiB of fp32 weights, expected at most 1.9 GiB for an ONNX file"
        )


def write_graphs(model: PreTrainedModel, folder: Path, names: Sequence[str] = GRAPHS) -> None:
    """Trace a model and write its graphs.

    Args:
        model: A causal language model in fp32, one that `check_exportable` takes.
        folder: Where to.
        names: Which of `GRAPHS`; one in 8 bits needs the one in fp32 before it.
    """
    with traceable(model):
        for name in tqdm(names, desc="graphs", unit="graph", leave=False):
            if name.endswith("_int8.onnx"):
                quantize_graph(folder / name.replace("_int8", ""), folder / name)
            else:
                _trace(model, folder / name, has_cache="without" not in name)


@contextmanager
def traceable(model: PreTrainedModel) -> Iterator[None]:
    """Give a model the forms of experts and attention that trace, and its own back.

    Args:
        model: The model.
    """
    config = model.config
    before = config._experts_implementation, config._attn_implementation
    attentions = [module for module in model.modules() if hasattr(module, "expand_kv")]
    for module in attentions:
        module.expand_kv = _expand_kv.__get__(module)
    model.set_experts_implementation("batched_mm")
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad(), warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            yield
    finally:
        model.set_experts_implementation(before[0])
        model.set_attn_implementation(before[1])
        for module in attentions:
            del module.expand_kv


def _expand_kv(self: nn.Module, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's own fills an empty tensor by parts, which becomes a ScatterND over every cached token."""
    batch_size, _, length, _ = kv_nope.shape
    width = self.qk_nope_head_dim + self.v_head_dim
    expanded = self.kv_b_proj(kv_nope).view(batch_size, length, -1, width).transpose(1, 2)
    k_nope, value_states = expanded.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
    return torch.cat([k_nope, k_rot.expand(-1, k_nope.shape[1], -1, -1)], dim=-1), value_states


def _trace(model: PreTrainedModel, path: Path, *, has_cache: bool) -> None:
    batch, num_past, num_new = 2, 5 if has_cache else 0, 3  # any numbers that are all different and not 1
    ids = torch.arange(batch * num_new).view(batch, num_new) % model.config.vocab_size
    mask = torch.ones(batch, num_past + num_new, dtype=torch.long)
    past = [
        (
            torch.zeros(batch, layer.num_heads, num_past, layer.key_width),
            torch.zeros(batch, layer.num_heads, num_past, layer.value_width),
        )
        for layer in (describe_cache(model) if has_cache else ())
    ]
    rows, along = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    graph = DecoderGraph(model, has_cache=has_cache).eval()
    shapes = (rows, rows, [(along, along) for _ in past])
    program = torch.export.export(graph, (ids, mask, past), dynamic_shapes=shapes, strict=False)
    cache = [f"{number}.{part}" for number in range(len(past)) for part in ("key", "value")]
    onnx_program = torch.onnx.export(
        program,
        (ids, mask, past),
        dynamo=True,
        opset_version=_OPSET,
        input_names=["input_ids", "attention_mask", *(f"past_key_values.{name}" for name in cache)],
        output_names=["logits", *(["expert_weights"] if has_cache else []), *(f"present.{name}" for name in cache)],
        verbose=False,
    )
    _name_lengths(onnx_program.model_proto, path, has_cache=has_cache)


def _name_lengths(proto: Any, path: Path, *, has_cache: bool) -> None:
    """Write the graph with its free lengths under names; torch calls them s26 and the like."""
    import onnx

    dims = {one.name: one.type.tensor_type.shape.dim for one in (*proto.graph.input, *proto.graph.output)}
    names = {dims["input_ids"][0].dim_param: "batch", dims["input_ids"][1].dim_param: "new"}
    if has_cache:
        names |= {
            dims["past_key_values.0.key"][2].dim_param: "past",
            dims["attention_mask"][1].dim_param: "past + new",
        }
    for shape in dims.values():
        for dim in shape:
            if dim.dim_param:
                dim.dim_param = names.get(dim.dim_param, dim.dim_param)
    del proto.graph.value_info[:]  # they hold torch's names, and a source line for each
    for node in proto.graph.node:
        del node.metadata_props[:]
    onnx.save(proto, path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's exporter from listing what of torchvision it lacks."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def describe_cache(model: PreTrainedModel) -> tuple[CacheLayer, ...]:
    """Return the shape of each layer's cache, from a pass over one token.

    Args:
        model: The model.
    """
    with torch.no_grad():
        cache: DynamicCache = model(torch.zeros(1, 1, dtype=torch.long), use_cache=True).past_key_values
    return tuple(CacheLayer(one.keys.shape[1], one.keys.shape[3], one.values.shape[3]) for one in cache.layers)


def describe_model(model: PreTrainedModel) -> ModelFacts:
    """Return what a program that runs the model needs to know.

    Args:
        model: The model.
    """
    config, layers = model.config, [layer for layer in find_moe_layers(model) if layer.experts is not None]
    ends = model.generation_config.eos_token_id
    ends = config.eos_token_id if ends is None else ends
    return ModelFacts(
        model_type=config.model_type,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_ids=tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,),
        cache=describe_cache(model),
        num_moe_layers=len(layers),
        num_experts=max((layer.num_experts or 0 for layer in layers), default=0),
        prompt_chunk=PROMPT_CHUNK,
    )


def measure_graphs(folder: Path, probe: ProbeText, names: Sequence[str] = GRAPHS) -> dict[str, Agreement]:
    """Return how far each graph is from the model.

    Args:
        folder: With the graphs.
        probe: The text and the model's logits.
        names: Which of `GRAPHS`.

    Raises:
        ValueError: A graph in fp32 computes something else than the model.
    """
    measured = {}
    for name in names:
        if "without" in name:
            measured[name] = probe.compare(partial(_read_without_cache, open_session(folder / name)))
        else:
            measured[name] = probe.compare(partial(_read, OnnxDecoder(folder / name, PROMPT_CHUNK)))
        difference = measured[name].largest_logit_difference
        if "int8" not in name and not difference <= _MOST_DIFFERENCE:  # also NaN
            raise ValueError(f"model: {name} differs from the model by {difference:.2g}, expected rounding only")
    return measured


def _read(decoder: OnnxDecoder, ids: np.ndarray) -> np.ndarray:
    return decoder.read(ids)[0]


def _read_without_cache(session: Any, ids: np.ndarray) -> np.ndarray:
    logits: np.ndarray = run_without_cache(session, ids[None])[0]
    return logits


def fill_readme(template: str, facts: ModelFacts, measured: dict[str, Agreement]) -> str:
    """Return a README of its template.

    Args:
        template: With names in double braces.
        facts: Of the model.
        measured: How far each graph is from the model.
    """
    rows = [
        f"| {name} | {one.largest_logit_difference:.1e} | {one.argmax_agreement:.2%} | {one.bits_per_byte:.4f} |"
        for name, one in measured.items()
    ]
    num_tokens = next(iter(measured.values())).num_tokens
    return (
        template.replace("{{measured}}", "\n".join(rows))
        .replace("{{num_tokens}}", f"{num_tokens:,}")
        .replace("{{bits_per_byte}}", f"{next(iter(measured.values())).bits_per_byte_of_model:.4f}")
        .replace("{{model_type}}", facts.model_type)
    )
