"""AWQ of routed experts: scales from what the inputs are like, then rounding, one layer after another.

`deepseek-moe quantize` calls `awq`. In each layer two kinds of scales are searched (`awq_search.py`): one of the MoE
block's input, folded into the norm before it (`awq_fold.py`), and one per expert of the inner channels, folded into
its up projection. Weights are rounded by scales that are searched group by group, and the next layer is calibrated on
what the rounded one gives.

Every expert is calibrated: one that too few tokens came to takes tokens of the whole layer beside its own. All tokens
through all experts would cost `E / K` times as much and gains nothing from about 64 tokens per expert on.

Axes: T tokens, K slots, H hidden, I expert width, E experts.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deepseek_training.compress.awq_fold import InputFold, find_fold
from deepseek_training.compress.awq_search import (
    candidate_scales,
    channel_weights,
    fake_quantize,
    group_scales,
    round_by,
    search_scales,
)
from deepseek_training.compress.error_feedback import round_with_feedback
from deepseek_training.compress.expert_saliency import read_call
from deepseek_training.compress.expert_stores import PackedStore, Rounding
from deepseek_training.compress.layer_walk import LayerWalk
from modeling_deepseek.experts_form import find_epilogue
from modeling_deepseek.families import MoeLayer, find_moe_layers
from modeling_deepseek.four_bit_experts import METHOD, find_format, packable_experts

# Of an expert; error feedback sees more, for it needs the moments of all its inputs together.
_LEAST_TOKENS, _MOST_TOKENS, _MOST_FED_BACK = 64, 256, 4096


@dataclasses.dataclass(frozen=True)
class AwqSettings:
    """How experts are rounded.

    Attributes:
        group_size: Weights that share a scale.
        bits: 4 where the experts are to be packed; others for comparisons. None: scales are folded, nothing rounded.
        grid: Scales that are tried beside the identity; 0 leaves rounding to nearest.
        is_clipped: Whether each group's scale is searched: the largest weights may be cut off, the sign may change.
        is_fed_back: Whether each column makes up for the errors of those before it (`error_feedback.py`).
        is_power_of_two: Whether scales are powers of two, with which folding changes no bit of the function.
        batch_size: Blocks of a forward pass.
    """

    group_size: int = 128
    bits: int | None = 4
    grid: int = 20
    is_clipped: bool = True
    is_fed_back: bool = False
    is_power_of_two: bool = False
    batch_size: int = 8


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What was done to one layer.

    Attributes:
        name: Of the block.
        num_tokens: That came to it in calibration; 0 for a prediction layer, which only generation runs.
        experts_below: Experts that fewer than 64 tokens came to, calibrated on tokens of the whole layer.
        experts_unseen: Of those the ones that none came to.
        gain: Error of the rounded gate and up projections by the scale that was chosen, over that by the identity.
    """

    name: str
    num_tokens: int
    experts_below: int
    experts_unseen: int
    gain: float


@torch.no_grad()
def awq(
    model: PreTrainedModel, blocks: Tensor, settings: AwqSettings, store: type[Any] = PackedStore
) -> list[LayerReport]:
    """Round a model's routed experts in place, by calibration text.

    Args:
        model: Of any family whose experts read what a norm gives; router, norms and shared experts take the scales.
        blocks: `[blocks, S]` token ids.
        settings: How.
        store: `PackedStore` or `DenseStore`.

    Returns:
        What was done, by layer.

    Raises:
        ValueError: Experts that cannot be packed, or a family without a norm that takes the scales.
    """
    packable_experts(model, find_format(4, "int4", settings.group_size))
    found = find_moe_layers(model)
    by_decoder = {model.get_submodule(layer.name.rpartition(".")[0]): layer for layer in found}
    stacks = {layer.name.rpartition(".")[0].rpartition(".")[0] for layer in found}
    if len(stacks) > 1:
        raise ValueError(f"model: got experts in {', '.join(sorted(stacks))}, expected one stack of decoder layers")
    was_training = model.training
    model.eval()
    walk = LayerWalk(model, list(model.get_submodule(stacks.pop()).children()), blocks, settings.batch_size)
    reports = {}
    for decoder in walk.layers:
        if decoder in by_decoder:
            layer = by_decoder.pop(decoder)
            fold = find_fold(layer, decoder, lambda decoder=decoder: walk.run_batch(decoder, 0))
            sample = Sample.take(layer, decoder, walk)
            reports[layer.name] = _round_layer(layer, fold, sample, settings, store)
        walk.go_on(decoder)
    for layer in by_decoder.values():
        reports[layer.name] = _round_unseen(layer, settings, store)
    model.train(was_training)
    if store is PackedStore:
        quantization = {"quant_method": METHOD, "bits": 4, "format": "int4", "group_size": settings.group_size}
        model.config.quantization_config = quantization
    return [reports[layer.name] for layer in found]


@dataclasses.dataclass(frozen=True)
class Sample:
    """What came to one layer's experts.

    Attributes:
        hidden: `[T, H]`.
        indices: `[T, K]`.
        weights: `[T, K]`, 0 or less for an unused slot.
    """

    hidden: Tensor
    indices: Tensor
    weights: Tensor

    @classmethod
    def take(cls, layer: MoeLayer, decoder: nn.Module, walk: LayerWalk) -> "Sample":
        """Run a layer over all calibration text.

        Args:
            layer: Router and experts.
            decoder: Around them.
            walk: With what comes to it.
        """
        calls: list[tuple[Tensor, Tensor, Tensor]] = []
        assert layer.experts is not None
        handle = layer.experts.register_forward_pre_hook(
            lambda _module, args, kwargs: calls.append(read_call(args, kwargs)), with_kwargs=True
        )
        try:
            for _ in walk.run(decoder):
                pass
        finally:
            handle.remove()
        return cls(*(torch.cat(parts) for parts in zip(*calls, strict=True)))

    def of_expert(self, expert: int, most: int = _MOST_TOKENS) -> tuple[Tensor, Tensor, int]:
        """Return tokens `[n, H]` and weights `[n]` in fp32 that calibrate an expert, and how many came to it.

        Args:
            expert: Its place.
            most: Of its own tokens; as many of others where too few came.
        """
        used = (self.indices == expert) & (self.weights > 0)
        rows = used.any(1).nonzero().flatten()
        weights = (self.weights.float() * used).sum(1)
        own = len(rows)
        rows = _evenly(rows, most)
        shares = weights[rows]
        if own < _LEAST_TOKENS:
            others = _evenly(torch.arange(len(self.hidden), device=rows.device), most)
            positive = self.weights[self.weights > 0].float()
            rows = torch.cat([rows, others])
            shares = torch.cat([shares, positive.mean().expand(len(others))])
        return self.hidden[rows].float(), shares, own


def _evenly(rows: Tensor, most: int) -> Tensor:
    """At most so many rows, spread over all of them."""
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most, device=rows.device).round().long()]


def _round_layer(
    layer: MoeLayer, fold: InputFold, sample: Sample, settings: AwqSettings, store: type[Any]
) -> LayerReport:
    """Search, fold and round one layer."""
    experts = fold.experts
    count = experts.gate_up_proj.shape[0]
    scale, gain = _search_input(experts, sample, settings)
    fold.apply(scale)
    sample = dataclasses.replace(sample, hidden=(sample.hidden.float() / scale).to(sample.hidden.dtype))
    kept = store(experts, settings)
    own = []
    for expert in range(count):
        tokens, weights, number = sample.of_expert(expert, _MOST_FED_BACK if settings.is_fed_back else _MOST_TOKENS)
        own.append(number)
        roundings = _round_expert(experts, expert, tokens, weights, settings)
        for name, rounding in zip(("gate_up_proj", "down_proj"), roundings, strict=True):
            kept.put(name, expert, rounding)
    kept.close()
    below = sum(number < _LEAST_TOKENS for number in own)
    return LayerReport(layer.name, len(sample.hidden), below, own.count(0), gain)


def _search_input(experts: nn.Module, sample: Sample, settings: AwqSettings) -> tuple[Tensor, float]:
    """The scale `[H]` of a layer's input, and its error over the identity's."""
    stack, epilogue = experts.gate_up_proj.data, find_epilogue(experts)
    size, bits = settings.group_size, settings.bits or 4
    x_mean = sample.hidden.float().abs().mean(0)
    w_mean = torch.stack([channel_weights(matrix, size) for matrix in stack]).mean(0)
    scales = candidate_scales(x_mean, w_mean, settings.grid, settings.is_power_of_two)
    if len(scales) == 1:
        return scales[0], 1.0
    losses = torch.zeros(len(scales), dtype=torch.float64)
    for expert, matrix in enumerate(stack):
        tokens, weights, _ = sample.of_expert(expert)
        gate_up, down = matrix.float(), experts.down_proj.data[expert].float()
        wanted = epilogue.apply(tokens @ gate_up.T) @ down.T
        for place, scale in enumerate(scales):
            rounded = fake_quantize(gate_up * scale, size, bits) / scale
            output = epilogue.apply(tokens @ rounded.T) @ down.T
            losses[place] += _loss(output - wanted, weights)
    best = int(losses.argmin())
    return scales[best], float(losses[best] / losses[0].clamp(min=1e-300))


def _round_expert(
    experts: nn.Module, expert: int, tokens: Tensor, weights: Tensor, settings: AwqSettings
) -> tuple[Rounding, Rounding]:
    """One expert's matrices `[2I, H]` and `[H, I]`, scaled and rounded, about to be stored."""
    epilogue = find_epilogue(experts)
    gate_up, down = experts.gate_up_proj.data[expert].float(), experts.down_proj.data[expert].float()
    first = _round_matrix(gate_up, tokens, settings)
    inner = epilogue.apply(tokens @ first.values.T)
    is_linear_in_up = epilogue.limit is None and epilogue.shift == 0 and not epilogue.is_interleaved
    if settings.grid and is_linear_in_up:
        few = _evenly(torch.arange(len(tokens), device=tokens.device), _MOST_TOKENS)
        wanted = epilogue.apply(tokens[few] @ gate_up.T) @ down.T
        scale = _search_inner(down, inner[few], wanted, weights[few], settings)
        first = first.with_upper_rows_divided(scale)  # rows of up
        down, inner = down * scale, inner / scale
    return first, _round_matrix(down, inner, settings)


def _round_matrix(matrix: Tensor, inputs: Tensor, settings: AwqSettings) -> Rounding:
    """Round a matrix `[M, N]` by its inputs `[n, N]`; without any, to nearest."""
    size, bits = settings.group_size, settings.bits
    if bits is None:
        return Rounding(matrix.clone())
    scales = group_scales(matrix, size, bits)
    if settings.is_clipped and len(inputs):
        scales = search_scales(matrix, inputs, size, bits)
    if settings.is_fed_back and len(inputs):
        return Rounding(round_with_feedback(matrix, inputs, scales, bits), scales)
    return Rounding(round_by(matrix, scales, bits), scales)


def _search_inner(down: Tensor, inner: Tensor, wanted: Tensor, weights: Tensor, settings: AwqSettings) -> Tensor:
    """The scale `[I]` of an expert's inner channels."""
    size, bits = settings.group_size, settings.bits or 4
    w_mean = channel_weights(down, size)
    scales = candidate_scales(inner.abs().mean(0), w_mean, settings.grid, settings.is_power_of_two)
    losses = [_loss((inner / scale) @ fake_quantize(down * scale, size, bits).T - wanted, weights) for scale in scales]
    return scales[min(range(len(scales)), key=losses.__getitem__)]


def _loss(difference: Tensor, weights: Tensor) -> float:
    """Squared error summed over tokens, each by the square of its router weight."""
    return float((difference.square().sum(1) * weights.square()).sum())


def _round_unseen(layer: MoeLayer, settings: AwqSettings, store: type[Any]) -> LayerReport:
    """Round a layer that no forward pass runs, to nearest."""
    assert layer.experts is not None
    kept = store(layer.experts, settings)
    count = layer.experts.gate_up_proj.shape[0]
    for expert in range(count):
        for name in ("gate_up_proj", "down_proj"):
            matrix = layer.experts.get_parameter(name).data[expert].float()
            kept.put(name, expert, _round_matrix(matrix, matrix.new_empty(0, matrix.shape[1]), settings))
    kept.close()
    return LayerReport(layer.name, 0, count, count, 1.0)
