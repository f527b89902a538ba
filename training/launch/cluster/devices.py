"""The accelerators and networks a plan can be made for: published figures, none measured by us.

Called by `step_time`, `search` and `deepseek-moe plan`.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One accelerator and the cluster it is usually found in.

    Attributes:
        name: As the command takes it.
        bf16_flops: Dense bf16 peak in FLOP/s.
        fp8_flops: Dense FP8 peak in FLOP/s; equal to `bf16_flops` where it has no FP8 products.
        memory_bytes: Memory of one device.
        memory_bandwidth: Bytes per second.
        node_size: Devices that one fast domain joins.
        node_bandwidth: Bytes per second and direction of one device within its node.
        network_bandwidth: Bytes per second and direction of one device to other nodes.
        watts: What one device's share of a whole server draws at most.
    """

    name: str
    bf16_flops: float
    fp8_flops: float
    memory_bytes: int
    memory_bandwidth: float
    node_size: int
    node_bandwidth: float
    network_bandwidth: float
    watts: float


# NVIDIA's data sheets (dense figures). Watts: a DGX's maximum over its devices (DGX H100 10.2 kW, H200 10.2, A100 6.5,
# B200 14.3). Network: one 400 Gb/s link per device, 200 Gb/s beside an A100. The H800 is an H100 with slower NVLink.
DEVICES = {
    device.name: device
    for device in (
        Device("a100", 312e12, 312e12, 80 * GIB, 2.04e12, 8, 300e9, 25e9, 813),
        Device("h100", 989e12, 1979e12, 80 * GIB, 3.35e12, 8, 450e9, 50e9, 1275),
        Device("h800", 989e12, 1979e12, 80 * GIB, 3.35e12, 8, 200e9, 50e9, 1275),
        Device("h200", 989e12, 1979e12, 141 * GIB, 4.8e12, 8, 450e9, 50e9, 1275),
        Device("b200", 2250e12, 4500e12, 180 * GIB, 7.7e12, 8, 900e9, 50e9, 1788),
    )
}


def find_device(name: str) -> Device:
    """Return the device of that name.

    Raises:
        ValueError: There is none.
    """
    if name.lower() not in DEVICES:
        raise ValueError(f"--gpu: got {name!r}, expected one of {', '.join(DEVICES)}")
    return DEVICES[name.lower()]
