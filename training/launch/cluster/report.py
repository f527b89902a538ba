"""The plan of a large run as one object and as text."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from deepseek_training.launch.cluster.devices import GIB, Device
from deepseek_training.launch.cluster.failures import (
    Checkpointing,
    best_interval_s,
    estimate_checkpoint,
    expected_goodput,
    mean_hours_between_failures,
)
from deepseek_training.launch.cluster.layout import Layout
from deepseek_training.launch.cluster.memory import Memory
from deepseek_training.launch.cluster.savings import find_savings
from deepseek_training.launch.cluster.search import USABLE_SHARE, Candidate, fits
from deepseek_training.launch.cluster.shape import ModelShape
from deepseek_training.launch.cluster.step_estimate import StepTime
from deepseek_training.launch.cluster.traffic import Traffic, estimate_traffic

# A data center's power over its servers'.
_POWER_OVERHEAD = 1.2
# Of the estimate, one standard deviation of rows left out of the fit (dev/fit_plan.py).
TYPICAL_FACTOR = 1.26


@dataclass(frozen=True)
class Run:
    """What the plan assumes of the run and its cluster.

    Attributes:
        tokens: To train on.
        device_hours: Mean hours of one device between failures.
        storage: Bytes per second of the whole storage.
        restart_s: Seconds from a failure to a start, without loading.
    """

    tokens: float
    device_hours: float
    storage: float
    restart_s: float


@dataclass(frozen=True)
class ClusterPlan:
    """One layout with all that follows from it."""

    shape: ModelShape
    device: Device
    num_devices: int
    run: Run
    layout: Layout
    memory: Memory
    step: StepTime
    traffic: Traffic
    checkpoint: Checkpointing
    failure_s: float
    interval_s: float
    goodput: float

    @property
    def num_steps(self) -> float:
        """Optimizer steps."""
        return self.run.tokens / self.step.tokens

    @property
    def hours(self) -> float:
        """Wall time of the whole run, failures and checkpoints included."""
        return self.num_steps * self.step.seconds / 3600 / self.goodput

    @property
    def device_hours(self) -> float:
        """Of all devices that the layout uses."""
        return self.hours * self.layout.world

    @property
    def megawatt_hours(self) -> float:
        """At the servers' most, with the data center's overhead."""
        return self.device_hours * self.device.watts * _POWER_OVERHEAD / 1e6

    @property
    def flops(self) -> float:
        """Useful FLOPs of the whole run."""
        return self.run.tokens * self.shape.flops_per_token(self.layout.length)


def make_plan(shape: ModelShape, device: Device, num_devices: int, run: Run, candidate: Candidate) -> ClusterPlan:
    """Return what follows from a layout.

    Args:
        shape: The model's.
        device: The accelerator.
        num_devices: How many there are.
        run: Tokens, failures, storage.
        candidate: The layout.
    """
    layout = candidate.layout
    checkpoint = estimate_checkpoint(
        shape.total,
        layout.world,
        moment_bytes=layout.moment_bytes,
        storage_bytes_per_second=run.storage,
        restart_s=run.restart_s,
    )
    failure_s = 3600 * mean_hours_between_failures(layout.world, run.device_hours)
    # The next checkpoint waits until the last one is on disk.
    interval = max(best_interval_s(checkpoint.pause_s, failure_s), checkpoint.write_s)
    return ClusterPlan(
        shape=shape,
        device=device,
        num_devices=num_devices,
        run=run,
        layout=layout,
        memory=candidate.memory,
        step=candidate.step,
        traffic=estimate_traffic(shape, layout, device),
        checkpoint=checkpoint,
        failure_s=failure_s,
        interval_s=interval,
        goodput=expected_goodput(interval, checkpoint, failure_s),
    )


def who_can_run(layout: Layout) -> str:
    """Return which engine can run a layout, and how a checkpoint gets there."""
    if layout.pipeline == 1 and layout.tensor == 1:
        parts = "FSDP2" if layout.zero == 3 else "DeepSpeed ZeRO"
        return f"transformers' Trainer with {parts}" + (" and expert parallelism" if layout.expert > 1 else "")
    missing = [name for name, size in (("pipeline", layout.pipeline), ("tensor", layout.tensor)) if size > 1]
    return (
        f"not transformers' Trainer ({' and '.join(missing)} parallelism of latent attention): Megatron-Bridge, from "
        "`deepseek-moe export MODEL OUT`, whose names are DeepSeek-V3's own (AutoBridge.from_hf_pretrained)"
    )


def describe(plan: ClusterPlan) -> str:
    """Return the plan as text, a line per fact."""
    shape, layout, step = plan.shape, plan.layout, plan.step
    idle = plan.num_devices - layout.world
    rows = [
        (
            "model",
            f"{shape.name}: {shape.total / 1e9:.1f} B parameters, {shape.active / 1e9:.1f} B active per token "
            f"({shape.active / shape.total:.1%}) at {shape.experts_per_token:g} experts",
        ),
        ("layout", f"{layout}; {layout.world:,} {plan.device.name}" + (f", {idle:,} idle" if idle else "")),
        ("engine", who_can_run(layout)),
        (
            "step",
            f"{layout.batch:,} x {layout.length:,} = {step.tokens / 1e6:.1f} M tokens in {step.seconds:.2f} s, "
            f"{layout.num_micro_batches} passes of {layout.micro_batch}",
        ),
        ("memory", describe_memory(plan.memory, plan.device)),
        ("with less memory", describe_savings(plan)),
        ("time", describe_time(step)),
        *(
            (
                name,
                f"{flow.node_bytes / 1e9:.1f} GB in the node, {flow.network_bytes / 1e9:.1f} GB to others per step "
                f"and device, {flow.seconds:.2f} s",
            )
            for name, flow in plan.traffic.flows().items()
            if flow.node_bytes + flow.network_bytes
        ),
        (
            "speed",
            f"{step.tokens_per_second:,.0f} tokens per second and device, {step.flops_per_second / 1e12:.0f} TFLOP/s, "
            f"{step.mfu:.1%} of the bf16 peak",
        ),
        (
            "checkpoint",
            f"{plan.checkpoint.size_bytes / 1e12:.2f} TB, {plan.checkpoint.write_s:.0f} s to write beside training; a "
            f"failure every {plan.failure_s / 3600:.1f} h, so one every {plan.interval_s / 60:.1f} min "
            f"(Young/Daly); {plan.goodput:.1%} of the time is kept work",
        ),
        (
            "run",
            f"{plan.run.tokens / 1e12:g} T tokens, {plan.flops:.3g} FLOPs: {plan.num_steps:,.0f} steps, "
            f"{plan.hours:,.0f} h, {plan.device_hours / 1e6:.3f} M device hours, "
            f"{plan.megawatt_hours:,.0f} MWh at most",
        ),
        ("error", f"times within a factor of {TYPICAL_FACTOR} of published runs, one standard deviation (--check)"),
    ]
    return "\n".join(f"{label:<22}{text}" for label, text in rows)


def describe_memory(memory: Memory, device: Device) -> str:
    """Return the fullest device's memory by part, and whether it fits."""
    parts = [
        f"{field.name} {getattr(memory, field.name) / GIB:.1f}"
        for field in dataclasses.fields(memory)
        if getattr(memory, field.name) >= 0.05 * GIB
    ]
    verdict = "fits" if fits(memory, device) else "does NOT fit"
    usable = USABLE_SHARE * device.memory_bytes / GIB
    return f"{memory.total / GIB:.1f} GiB on the fullest device ({', '.join(parts)}); {verdict} in {usable:.0f} usable"


def describe_savings(plan: ClusterPlan) -> str:
    """Return what the fullest device would hold by each way of keeping less on it."""
    return "; ".join(
        f"{one.way} {one.memory.total / GIB:.1f} GiB"
        + (f" and {one.host_bytes / GIB:.1f} on the host" if one.host_bytes else "")
        for one in find_savings(plan.shape, plan.layout)
    )


def describe_time(step: StepTime) -> str:
    """Return what a step is made of."""
    names = ("products", "attention", "other", "recompute", "bubble", "exposed", "optimizer")
    shares = {"exposed": "traffic that nothing hides", "other": "norms, routing, launches"}
    return ", ".join(
        f"{shares.get(name, name)} {getattr(step, name) / step.seconds:.0%}"
        for name in names
        if getattr(step, name) / step.seconds >= 0.005
    )


def as_record(plan: ClusterPlan) -> dict[str, Any]:
    """Return the plan as plain values, for JSON; bytes, seconds and FLOPs without prefixes."""
    return {
        "model": plan.shape.name,
        "parameters": plan.shape.total,
        "active_parameters": plan.shape.active,
        "device": dataclasses.asdict(plan.device),
        "num_devices": plan.num_devices,
        "layout": dataclasses.asdict(plan.layout),
        "memory_bytes": {**dataclasses.asdict(plan.memory), "total": plan.memory.total},
        "fits": fits(plan.memory, plan.device),
        "less_memory": {
            one.way: {"total": one.memory.total, "host": one.host_bytes}
            for one in find_savings(plan.shape, plan.layout)
        },
        "step": {**dataclasses.asdict(plan.step), "seconds": plan.step.seconds, "mfu": plan.step.mfu},
        "traffic": {name: dataclasses.asdict(flow) for name, flow in plan.traffic.flows().items()},
        "checkpoint": dataclasses.asdict(plan.checkpoint),
        "failure_s": plan.failure_s,
        "interval_s": plan.interval_s,
        "goodput": plan.goodput,
        "tokens": plan.run.tokens,
        "steps": plan.num_steps,
        "hours": plan.hours,
        "device_hours": plan.device_hours,
        "megawatt_hours": plan.megawatt_hours,
        "typical_factor": TYPICAL_FACTOR,
    }
