"""How long an optimizer step takes on a cluster, and what share of the products' peak that is.

Products run at a share of the peak, everything else at a share of the memory's rate; then the pipeline's bubble, the
traffic that nothing hides, and the optimizer. What is taken as given stands in `Rates`; `published` holds the estimate
against runs that others have published, and the error it finds is the plan's error.
"""

from dataclasses import dataclass

from deepseek_training.launch.cluster.devices import Device
from deepseek_training.launch.cluster.layout import Layout, stages_of
from deepseek_training.launch.cluster.memory import held_parameters
from deepseek_training.launch.cluster.shape import LayerShape, ModelShape
from deepseek_training.launch.cluster.traffic import Traffic, estimate_traffic


@dataclass(frozen=True)
class Rates:
    """What the estimate takes as given, chosen by `dev/fit_plan.py` in view of the published runs.

    Attributes:
        dense: Share of the peak that dense products reach.
        grouped: The same of the experts' products.
        fp8: What both keep of their share where they run in FP8, quantization around them included.
        attention: Share of the bf16 peak of scores and weighted sums.
        memory: Share of the memory's rate.
        touches: Reads and writes of a token's hidden vector per layer outside of products, forward and backward.
        expert_touches: The same per chosen expert, in widths of D and of F: permuting, activation, weighting.
        moe_s: Seconds per layer of experts and pass that do not depend on the tokens: launches, counts that the host
            waits for, the slowest expert.
        hidden_data: Share of the gradients' and weights' exchange that passes hide.
    """

    dense: float = 0.56
    grouped: float = 0.60
    fp8: float = 0.45
    attention: float = 0.45
    memory: float = 0.75
    touches: float = 120.0
    expert_touches: float = 8.0
    moe_s: float = 0.0049
    hidden_data: float = 0.8


RATES = Rates()


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step.

    Attributes:
        products: Matrix products of all passes in the longest stage.
        attention: Scores and weighted sums.
        other: What the memory's rate limits.
        recompute: Forward work done again.
        bubble: Stages that wait.
        exposed: Traffic that nothing hides.
        optimizer: AdamW.
        tokens: Of the step, all devices together.
        flops: Useful FLOPs of the step.
        num_devices: All devices.
        peak: bf16 FLOP/s of one device.
    """

    products: float
    attention: float
    other: float
    recompute: float
    bubble: float
    exposed: float
    optimizer: float
    tokens: int
    flops: float
    num_devices: int
    peak: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        busy = self.products + self.attention + self.other + self.recompute
        return busy + self.bubble + self.exposed + self.optimizer

    @property
    def tokens_per_second(self) -> float:
        """Per device."""
        return self.tokens / self.seconds / self.num_devices

    @property
    def flops_per_second(self) -> float:
        """Useful FLOP/s per device."""
        return self.flops / self.seconds / self.num_devices

    @property
    def mfu(self) -> float:
        """Useful FLOP/s over the bf16 peak, also where products run in FP8."""
        return self.flops_per_second / self.peak


def estimate_step(shape: ModelShape, layout: Layout, device: Device, rates: Rates = RATES) -> StepTime:
    """Return the time of one optimizer step.

    Args:
        shape: The model's.
        layout: One that `check_layout` accepts.
        device: What it runs on.
        rates: What the estimate takes as given.
    """
    stages = stages_of(layout, shape)
    costs = [
        _pass_cost(shape, layout, layers, device, rates, is_last=place == len(stages) - 1)
        for place, layers in enumerate(stages)
    ]
    products, attention, other, recompute = max(costs, key=sum)
    passes = layout.num_micro_batches
    busy = products + attention + other + recompute
    traffic = estimate_traffic(shape, layout, device)
    exposed = _exposed(traffic, layout, busy * passes, rates)
    bubble = (busy + traffic.experts.seconds / passes * (not layout.overlaps_experts)) * _bubble_passes(layout)
    return StepTime(
        products=products * passes,
        attention=attention * passes,
        other=other * passes,
        recompute=recompute * passes,
        bubble=bubble,
        exposed=exposed,
        optimizer=_optimizer(shape, layout, device, rates),
        tokens=layout.batch * layout.length,
        flops=layout.batch * layout.length * shape.flops_per_token(layout.length),
        num_devices=layout.world,
        peak=device.bf16_flops,
    )


def _pass_cost(
    shape: ModelShape, layout: Layout, layers: list[LayerShape], device: Device, rates: Rates, *, is_last: bool
) -> tuple[float, float, float, float]:
    """Seconds of one pass, forward and backward: products, attention, other work, recomputation."""
    is_fp8 = layout.precision == "fp8" and device.fp8_flops > device.bf16_flops
    peak = device.fp8_flops if is_fp8 else device.bf16_flops
    kept = rates.fp8 if is_fp8 else 1.0
    tokens = layout.tokens_per_pass / layout.tensor
    dense = sum(layer.attention + layer.dense for layer in layers)
    routed = sum(shape.active_of(layer) - layer.attention - layer.dense for layer in layers)
    # Backward costs twice the forward.
    forward = 2 * tokens * (dense / rates.dense + routed / rates.grouped) / (peak * kept)
    head = 2 * tokens * shape.vocabulary * shape.hidden / (device.bf16_flops * rates.dense) if is_last else 0.0
    attention = len(layers) * tokens * shape.attention_flops(layout.length) / (device.bf16_flops * rates.attention)
    touched = sum(_touched_bytes(shape, layer, rates) for layer in layers) * tokens
    other = touched / (device.memory_bandwidth * rates.memory)
    other += rates.moe_s * sum(layer.num_experts > 0 for layer in layers)
    again = {"none": 0.0, "selective": other / 6, "full": forward + attention + other / 3}[layout.recompute]
    return 3 * (forward + head), 3 * attention, other, again


def _touched_bytes(shape: ModelShape, layer: LayerShape, rates: Rates) -> float:
    touched = rates.touches * shape.hidden + rates.expert_touches * layer.dense / (3 * shape.hidden)
    if layer.num_experts:
        touched += rates.expert_touches * shape.experts_per_token * (shape.hidden + shape.expert_width)
    return 2 * touched


def _bubble_passes(layout: Layout) -> float:
    """Passes that a stage waits per step (arXiv 2104.04473, section 2.2; DeepSeek-V3, arXiv 2412.19437, table 2)."""
    if layout.schedule == "dualpipe":
        # (P/2 - 1)(F&B + B - 3W), with the backward pass twice the forward and half of it for weights.
        return (layout.pipeline / 2 - 1) * 2 / 3
    return (layout.pipeline - 1) / layout.virtual


def _exposed(traffic: Traffic, layout: Layout, busy: float, rates: Rates) -> float:
    """Seconds of traffic that products do not hide."""
    experts = max(0.0, traffic.experts.seconds - busy) if layout.overlaps_experts else traffic.experts.seconds
    hidden = min(rates.hidden_data * traffic.data.seconds, busy / 2)
    return experts + traffic.tensor.seconds + traffic.data.seconds - hidden


def _optimizer(shape: ModelShape, layout: Layout, device: Device, rates: Rates) -> float:
    common, routed = held_parameters(shape, layout, max(stages_of(layout, shape), key=len))
    if layout.zero:
        common, routed = common / layout.data, routed / max(1, layout.expert_data)
    # Read and write the fp32 copy and both moments, read the gradient, write the weight.
    touched = 2 * (4 + 2 * layout.moment_bytes) + 4 + 2
    return (common + routed) * touched / (device.memory_bandwidth * rates.memory)
