"""The memory of the fullest device, by part.

Weights in bf16, gradients in fp32, AdamW's moments and an fp32 copy of the weights, each over the devices that share
it (ZeRO; Rajbhandari et al. 2020, arXiv 1910.02054, section 5), activations of the passes in flight
(Korthikanti et al. 2022, arXiv 2205.05198, with our experts' own formula), the loss, and the exchanged tokens.
Not counted: fragmentation of the allocator and the buffers of the communication library.
"""

from dataclasses import dataclass, fields

from deepseek_training.launch.cluster.layout import Layout, stages_of
from deepseek_training.launch.cluster.shape import LayerShape, ModelShape

_BF16, _FP32 = 2, 4
# At once in the backward pass of transformers' loss, whatever the weights' dtype: the log-softmax, its gradient and
# that of the logits, each in fp32; the logits themselves are gone by then.
_LOSS_BYTES = 3 * _FP32


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights: In bf16; under ZeRO-3 two gathered layers only, for FSDP2 casts the fp32 copy when it gathers.
        gradients: In fp32.
        optimizer: The fp32 copy and both moments.
        activations: Of every pass in flight.
        logits: What the loss of one pass takes, where the head is.
        exchange: Tokens on their way to experts and back, of one layer.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    exchange: float

    @property
    def total(self) -> float:
        """The sum."""
        return sum(getattr(self, field.name) for field in fields(self))


def estimate_memory(shape: ModelShape, layout: Layout) -> Memory:
    """Return the memory of the pipeline stage that needs most.

    Args:
        shape: The model's.
        layout: One that `check_layout` accepts.
    """
    stages = stages_of(layout, shape)
    return max((_stage_memory(shape, layout, stages, place) for place in range(len(stages))), key=lambda m: m.total)


def held_parameters(
    shape: ModelShape, layout: Layout, layers: list[LayerShape], *, ends: int = 0
) -> tuple[float, float]:
    """Return how many shared and how many expert parameters a device holds before ZeRO divides them.

    Args:
        shape: The model's.
        layout: The division.
        layers: Of the device's stage.
        ends: Parameters of the embedding table, the last norm and the head that the stage holds.
    """
    common = sum((layer.attention + layer.dense) / layout.tensor + layer.rest for layer in layers)
    routed = sum(layer.routed for layer in layers) / layout.expert
    return common + ends / layout.tensor, routed


def _stage_memory(shape: ModelShape, layout: Layout, stages: list[list[LayerShape]], place: int) -> Memory:
    layers, is_last = stages[place], place == len(stages) - 1
    ends = (shape.embedding if place == 0 else 0) + (shape.head + shape.rest if is_last else 0)
    if is_last and place > 0 and not shape.head:
        ends += shape.embedding  # a tied table stands at both ends
    common, routed = held_parameters(shape, layout, layers, ends=ends)
    copies = 2 if layout.schedule == "dualpipe" else 1
    in_flight = _passes_in_flight(layout, place)
    tokens = layout.tokens_per_pass
    kept = sum(activation_bytes(shape, layer, layout) for layer in layers) * tokens
    widest = max((activation_bytes(shape, layer, layout, recompute="none") for layer in layers), default=0.0)
    again = widest * tokens if layout.recompute == "full" else 0.0
    logits = tokens * shape.vocabulary / layout.tensor * _LOSS_BYTES if is_last else 0.0
    return Memory(
        weights=_gathered(shape, layout, ends) if layout.zero == 3 else copies * _BF16 * (common + routed),
        gradients=_FP32 * _split(common, routed, layout, from_stage=2),
        optimizer=(_FP32 + 2 * layout.moment_size) * _split(common, routed, layout, from_stage=1),
        activations=kept * in_flight + again,
        logits=logits,
        exchange=exchange_bytes(shape, layout),
    )


def _split(common: float, routed: float, layout: Layout, *, from_stage: int) -> float:
    if layout.zero < from_stage:
        return common + routed
    return common / layout.data + routed / max(1, layout.expert_data)


def _gathered(shape: ModelShape, layout: Layout, ends: int) -> float:
    """Two layers' whole weights, the one at work and the one fetched ahead, and table and head, which stay."""
    largest = max(sum(held_parameters(shape, layout, [layer])) for layer in shape.layers)
    return _BF16 * (2 * largest + ends / layout.tensor)


def _passes_in_flight(layout: Layout, place: int) -> float:
    if layout.schedule == "dualpipe":
        return layout.pipeline + 1
    waiting = layout.pipeline - place
    # Interleaved parts are smaller, but the first stage begins more of them (arXiv 2104.04473, section 2.2).
    return (
        waiting * (1 + (layout.pipeline - 1) / (layout.pipeline * layout.virtual)) if layout.virtual > 1 else waiting
    )


def activation_bytes(shape: ModelShape, layer: LayerShape, layout: Layout, *, recompute: str | None = None) -> float:
    """Return the bytes that a layer keeps per token for the backward pass.

    Args:
        shape: The model's.
        layer: The layer.
        layout: The division; tensor-parallel devices share what lies along the sequence or the heads.
        recompute: Instead of the layout's.
    """
    mode = recompute or layout.recompute
    if mode == "full":
        return _BF16 * shape.hidden / layout.tensor
    # Two inputs to a residual sum, queries, keys, values, the attention's output; a norm's output unless made again.
    # Latent attention makes queries, keys and values again from their latents, as DeepSeek-V3 does (section 3.2.3).
    inputs = shape.num_heads * shape.query_width + shape.key_value_width
    if mode == "selective" and shape.latent_width:
        inputs = shape.latent_width
    attention = 2 * shape.hidden + inputs + shape.num_heads * shape.value_width
    norms = 2 * shape.hidden if mode == "none" else 0
    # A gated network keeps two pre-activations; their product only where it is not made again.
    dense = layer.dense / (3 * shape.hidden)
    dense_kept = (3 if mode == "none" else 2) * dense
    # The fused experts keep 2H + 4KI bytes per token; without "selective" transformers' keep their input and product.
    routed = 0.0
    if layer.num_experts:
        k, width = shape.experts_per_token, shape.expert_width
        routed = k * (2 * width + (shape.hidden + width if mode == "none" else 0)) + shape.hidden
    return _BF16 * ((attention + norms + dense_kept) / layout.tensor + routed / layout.tensor)


def exchange_bytes(shape: ModelShape, layout: Layout) -> float:
    """Return the bytes of the tokens that a device receives for its experts and gives back, in one layer."""
    if layout.expert == 1 or not shape.num_experts:
        return 0.0
    received = layout.tokens_per_pass / layout.tensor * shape.experts_per_token
    return 2 * _BF16 * received * shape.hidden
