"""A mixture of experts made of a dense model, exact at the start: the experts are copies of its feed-forward layers.

`deepseek-moe upcycle` calls `upcycle`. Of a Llama-like dense model it makes a stock class of transformers that differs
from it in the feed-forward layers alone (`TARGETS`), so that everything which reads that class reads the result.

With G = 1 an expert is the dense layer, and weights that sum to 1 give its output whichever experts were chosen. With
G > 1 each copy is cut into G pieces along the inner axis, whose router rows are the same: whole copies are chosen,
with 1/G of a copy's weight per piece, and `down_proj` is multiplied by G:

    sum over chosen copies c, pieces p of (w_c / G) * G * piece_p(x) = sum over c of w_c * mlp(x) = mlp(x)

Where two copies' scores are the same number in floating point, and not all experts are chosen, top-k may take a piece
of each; that token's output is then another (`is_exact`).

The router's rows are drawn at random and differ by copy. Copies see other tokens from the first step on and grow
apart; nothing else breaks the symmetry.

Axes: D hidden, E experts, F inner width of the dense layer, G pieces of a copy, K experts per token.

Reference: Komatsuzaki et al. 2023, arXiv 2212.05055 (copies); He et al. 2024, arXiv 2410.07524, section 4 (pieces and
equal router rows, their virtual groups; they scale both projections, here only the last one is).
"""

import dataclasses
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from modeling_deepseek.families import find_moe_layers

# What names a class or a file, or changes nothing that a finished model computes.
_FREE = {"architectures", "dtype", "model_type", "pretraining_tp", "transformers_version"}
# Attention of every class asks for it, whether or not the configuration declares it.
_READ_ANYWAY = ("head_dim",)
_PLAIN_LAYERS = {"full_attention"}
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Target:
    """The sparse class of a dense one.

    Attributes:
        model_type: As in its configuration.
        experts: Its setting for the number of experts.
        width: Its setting for an expert's inner width.
        settings: What makes its router renormalize, and every layer sparse.
    """

    model_type: str
    experts: str
    width: str
    settings: dict[str, Any]


# By the dense model's type. Each has the dense one's attention, norms, embeddings and head.
_MIXTRAL = Target("mixtral", "num_local_experts", "intermediate_size", {})
TARGETS = {
    "llama": _MIXTRAL,
    "mistral": _MIXTRAL,
    "qwen3": Target(
        "qwen3_moe",
        "num_experts",
        "moe_intermediate_size",
        {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
}


def upcycled_config(
    dense: PreTrainedConfig, *, n_routed_experts: int, num_experts_per_tok: int, granularity: int = 1
) -> PreTrainedConfig:
    """Return the configuration of the mixture, before any weight is read.

    Args:
        dense: The dense model's.
        n_routed_experts: E, a multiple of G.
        num_experts_per_tok: K, a multiple of G and at most E.
        granularity: G, a divisor of F.

    Raises:
        ValueError: The model is not one that can be upcycled, or the numbers do not fit it.
    """
    target = TARGETS.get(dense.model_type)
    if target is None:
        types = ", ".join(sorted(TARGETS))
        raise ValueError(f"model: got type {dense.model_type}, expected a dense model of one of {types}")
    if getattr(dense, "quantization_config", None) is not None:
        raise ValueError("model: got quantized weights, expected ordinary ones to copy; upcycle first, then quantize")
    _check_numbers(n_routed_experts, num_experts_per_tok, granularity, dense.intermediate_size)
    sparse = AutoConfig.for_model(target.model_type)
    known, values, defaults = {*vars(sparse), *_READ_ANYWAY}, dense.to_dict(), vars(type(dense)())
    for name, value in values.items():
        is_plain = not value or value == defaults.get(name) or (name == "layer_types" and set(value) == _PLAIN_LAYERS)
        if name not in known and not _is_free(name) and not is_plain:
            raise ValueError(f"model: got {name}={value!r}, which {target.model_type} does not have")
    carried = {name: value for name, value in values.items() if name in known and not _is_free(name)}
    return AutoConfig.for_model(
        target.model_type,
        **{
            **carried,
            **target.settings,
            target.experts: n_routed_experts,
            "num_experts_per_tok": num_experts_per_tok,
            target.width: dense.intermediate_size // granularity,
        },
    )


def _is_free(name: str) -> bool:
    return name in _FREE or name.startswith("_")


def _check_numbers(experts: int, chosen: int, pieces: int, width: int) -> None:
    if pieces < 1 or width % pieces:
        raise ValueError(f"granularity: got {pieces}, expected a divisor of the feed-forward width {width}")
    if experts < 2 or experts % pieces:
        multiple = "" if pieces == 1 else f" and a multiple of granularity={pieces}"
        raise ValueError(f"n_routed_experts: got {experts}, expected at least 2{multiple}")
    if not pieces <= chosen <= experts or chosen % pieces:
        multiple = "" if pieces == 1 else f", a multiple of granularity={pieces}"
        raise ValueError(
            f"num_experts_per_tok: got {chosen}, expected {pieces} to n_routed_experts={experts}{multiple}"
        )


def is_exact(*, n_routed_experts: int, num_experts_per_tok: int, granularity: int) -> bool:
    """Tell whether the mixture computes what the dense model does for every token, or for all but ties.

    Args:
        n_routed_experts: E.
        num_experts_per_tok: K.
        granularity: G.
    """
    return granularity == 1 or num_experts_per_tok == n_routed_experts


@torch.no_grad()
def upcycle(dense: PreTrainedModel, config: PreTrainedConfig, *, router_std: float = 0.02, seed: int = 0) -> Any:
    """Return the mixture, with the dense model's function in its dtype; the dense one stays as it is.

    Args:
        dense: A causal language model.
        config: From `upcycled_config`.
        router_std: Standard deviation of the router's rows.
        seed: Of these rows.

    Raises:
        ValueError: A weight of the dense model, such as a bias, has no place in the mixture.
    """
    sparse = AutoModelForCausalLM.from_config(config, dtype=dense.dtype).eval()
    source, saved = dense.state_dict(), sparse.state_dict()
    layers = find_moe_layers(sparse)
    owners = tuple(f"{layer.name}." for layer in layers)
    used = {f"{layer.name}.{part}.weight" for layer in layers for part in _FEED_FORWARD}
    for name, tensor in saved.items():
        if name.startswith(owners):
            continue
        if name not in source or source[name].shape != tensor.shape:
            raise ValueError(f"model: got no {name} of shape {list(tensor.shape)}, which {config.model_type} has")
        tensor.copy_(source[name])
        used.add(name)
    strange = sorted(source.keys() - used)
    if strange:
        raise ValueError(f"model: got {strange[0]}, which has no place in {config.model_type}")
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        assert layer.experts is not None, "the targets are classes with fused experts"
        gate, up, down = (source[f"{layer.name}.{part}.weight"] for part in _FEED_FORWARD)
        _fill(layer.experts, gate, up, down)
        pieces = gate.shape[0] // layer.experts.down_proj.shape[2]
        router = layer.router.weight
        rows = torch.randn(len(router) // pieces, router.shape[1], generator=generator) * router_std
        router.copy_(rows.repeat_interleave(pieces, 0))
    sparse.generation_config = dense.generation_config
    return sparse


def _fill(experts: Any, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
    """Expert c * G + p is piece p of copy c: `gate_up_proj` `[E, 2F/G, D]`, `down_proj` `[E, D, F/G]`."""
    width = experts.down_proj.shape[2]
    pieces = gate.shape[0] // width
    for number in range(len(experts.down_proj)):
        part = slice(number % pieces * width, (number % pieces + 1) * width)
        experts.gate_up_proj[number] = torch.cat([gate[part], up[part]])
        experts.down_proj[number] = down[:, part] * pieces


@torch.no_grad()
def spread_of_copies(model: PreTrainedModel, granularity: int = 1) -> float:
    """Return how far the copies of each piece are from their mean, as a share of the mean's norm: 0 at the start.

    Args:
        model: A mixture from `upcycle`, trained or not.
        granularity: G.
    """
    apart = whole = 0.0
    for layer in find_moe_layers(model):
        assert layer.experts is not None, "the targets are classes with fused experts"
        for stack in (layer.experts.gate_up_proj, layer.experts.down_proj):
            copies = stack.detach().double().view(-1, granularity, *stack.shape[1:])
            mean = copies.mean(0, keepdim=True)
            apart += (copies - mean).square().mean(0).sum().item()
            whole += mean.square().sum().item()
    return (apart / whole) ** 0.5
