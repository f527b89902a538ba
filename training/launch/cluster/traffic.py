"""What one device sends per optimizer step, within its node and to others, and how long that takes.

Sizes are of a ring: a group of n sends (n - 1) / n of what it gathers or reduces. Expert exchange follows DeepEP: a
token crosses the network once for each node that one of its experts is on, and goes on over NVLink from there.
"""

from dataclasses import dataclass

from deepseek_training.launch.cluster.devices import Device
from deepseek_training.launch.cluster.layout import Layout, stages_of
from deepseek_training.launch.cluster.memory import held_parameters
from deepseek_training.launch.cluster.shape import LayerShape, ModelShape

_BF16, _FP32 = 2, 4
# Shares of a link's published rate that long messages reach: DeepEP's README measures 43 to 47 of 50 GB/s over the
# network and 153 to 158 of 160 within a node of H800.
_NODE_SHARE, _NETWORK_SHARE = 0.95, 0.9


@dataclass(frozen=True)
class Flow:
    """One kind of traffic.

    Attributes:
        node_bytes: Sent per step within the node.
        network_bytes: Sent per step to other nodes.
        seconds: Both at the links' measured shares, one after the other where they do not run beside each other.
    """

    node_bytes: float
    network_bytes: float
    seconds: float


@dataclass(frozen=True)
class Traffic:
    """All of one device's traffic per optimizer step.

    Attributes:
        experts: Tokens to experts and back, forward and backward.
        tensor: Activations of tensor parallelism.
        pipeline: Activations between stages.
        data: Gradients and weights among data-parallel devices.
    """

    experts: Flow
    tensor: Flow
    pipeline: Flow
    data: Flow

    def flows(self) -> dict[str, Flow]:
        """Return each flow under the name that is printed."""
        return {
            "expert exchange": self.experts,
            "tensor parallel": self.tensor,
            "pipeline": self.pipeline,
            "weights and gradients": self.data,
        }


def estimate_traffic(shape: ModelShape, layout: Layout, device: Device) -> Traffic:
    """Return the traffic of a device in the longest stage.

    Args:
        shape: The model's.
        layout: One that `check_layout` accepts.
        device: With its links.
    """
    layers = max(stages_of(layout, shape), key=len)
    return Traffic(
        experts=_exchange(shape, layout, layers, device),
        tensor=_tensor(shape, layout, layers, device),
        pipeline=_pipeline(shape, layout, device),
        data=_data(shape, layout, layers, device),
    )


def _flow(node_bytes: float, network_bytes: float, device: Device, *, beside: bool = False) -> Flow:
    times = (
        node_bytes / (device.node_bandwidth * _NODE_SHARE),
        network_bytes / (device.network_bandwidth * _NETWORK_SHARE),
    )
    return Flow(node_bytes, network_bytes, max(times) if beside else sum(times))


def _exchange(shape: ModelShape, layout: Layout, layers: list[LayerShape], device: Device) -> Flow:
    num_moe = sum(layer.num_experts > 0 for layer in layers)
    if layout.expert == 1 or not num_moe:
        return Flow(0.0, 0.0, 0.0)
    tokens = layout.tokens_per_pass / layout.tensor * layout.num_micro_batches * num_moe
    # Out and back in both directions; going out forward in the products' precision, all else in bf16.
    width = shape.hidden * (3 * _BF16 + (1 if layout.precision == "fp8" else _BF16))
    nodes = max(1, layout.expert // device.node_size)
    hit = nodes * (1 - (1 - 1 / nodes) ** shape.experts_per_token)
    network = tokens * width * hit * (nodes - 1) / nodes
    within = min(layout.expert, device.node_size)
    node = tokens * width * shape.experts_per_token * (within - 1) / within
    return _flow(node, network, device, beside=True)


def _tensor(shape: ModelShape, layout: Layout, layers: list[LayerShape], device: Device) -> Flow:
    if layout.tensor == 1:
        return Flow(0.0, 0.0, 0.0)
    tokens = layout.tokens_per_pass * layout.num_micro_batches
    # A gather and a reduction around the attention and around a dense network, forward and backward.
    pairs = sum(2 if layer.dense else 1 for layer in layers)
    size = tokens * shape.hidden * _BF16 * 4 * pairs * (layout.tensor - 1) / layout.tensor
    return _flow(size, 0.0, device) if layout.tensor <= device.node_size else _flow(0.0, size, device)


def _pipeline(shape: ModelShape, layout: Layout, device: Device) -> Flow:
    if layout.pipeline == 1:
        return Flow(0.0, 0.0, 0.0)
    tokens = layout.tokens_per_pass / layout.tensor * layout.num_micro_batches * layout.virtual
    return _flow(0.0, 2 * tokens * shape.hidden * _BF16, device)


def _data(shape: ModelShape, layout: Layout, layers: list[LayerShape], device: Device) -> Flow:
    ends = shape.embedding + (shape.head + shape.rest if layout.pipeline == 1 else 0)
    common, routed = held_parameters(shape, layout, layers, ends=ends)
    node = network = 0.0
    for held, group in ((common, layout.data), (routed, layout.expert_data)):
        if group <= 1:
            continue
        size = data_bytes(held, group, layout)
        if layout.zero == 3 and held is common:  # FSDP2 keeps the table and the head from forward to backward
            size -= layout.num_micro_batches * _BF16 * ends / layout.tensor * (group - 1) / group
        if layout.tensor * group <= device.node_size:
            node += size
        else:
            network += size
    return _flow(node, network, device)


def data_bytes(held: float, group: int, layout: Layout) -> float:
    """Return what a device sends per step to keep so many parameters equal within a group.

    ZeRO-0 reduces and gathers fp32 gradients; 1 and 2 reduce fp32 gradients and gather bf16 weights; 3 gathers bf16
    weights for the forward and again for the backward pass of each micro batch, and reduces fp32 gradients as often.

    Args:
        held: Parameters before they are divided.
        group: Devices.
        layout: For its ZeRO stage and passes.
    """
    share = (group - 1) / group
    if layout.zero == 0:
        return 2 * _FP32 * held * share
    if layout.zero < 3:
        return (_FP32 + _BF16) * held * share
    return layout.num_micro_batches * (_FP32 + 2 * _BF16) * held * share
