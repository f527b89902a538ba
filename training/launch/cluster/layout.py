"""How a training is divided over devices, and the checks that a division must pass.

World size = data * tensor * pipeline. Expert parallelism takes its devices from data * tensor, as Megatron and
transformers do; what is left of those holds copies of the same experts.
"""

from dataclasses import dataclass
from math import ceil

from deepseek_training.launch.cluster.shape import LayerShape, ModelShape

RECOMPUTE = ("none", "selective", "full")
SCHEDULES = ("1f1b", "dualpipe")
PRECISIONS = ("bf16", "fp8")


@dataclass(frozen=True)
class Layout:
    """One division.

    Attributes:
        data: Data-parallel size.
        tensor: Tensor-parallel size, of attention and dense networks; experts stay whole.
        pipeline: Pipeline stages.
        virtual: Interleaved parts per stage.
        expert: Expert-parallel size.
        zero: 0 to 3: optimizer states (1), gradients (2) and weights (3) are split over data-parallel devices.
        micro_batch: Sequences per pass.
        batch: Sequences per optimizer step, all devices together.
        length: Tokens per sequence.
        recompute: "none"; "selective": norms, activations and what the experts received are made again; "full":
            all but each layer's input.
        schedule: "1f1b", interleaved where `virtual` is over 1, or DeepSeek-V3's "dualpipe", which holds the
            weights twice.
        overlaps_experts: Whether the exchange of tokens runs beside products (DualPipe, Megatron's 1f1b overlap).
        precision: Of the products: "bf16" or "fp8".
        moment_bytes: Bytes of one of AdamW's moments: 4, 2 as DeepSeek-V3 keeps them, or 1 of an 8-bit optimizer.
    """

    data: int
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    expert: int = 1
    zero: int = 1
    micro_batch: int = 1
    batch: int = 1
    length: int = 4096
    recompute: str = "selective"
    schedule: str = "1f1b"
    overlaps_experts: bool = False
    precision: str = "bf16"
    moment_bytes: int = 4

    @property
    def world(self) -> int:
        """All devices."""
        return self.data * self.tensor * self.pipeline

    @property
    def expert_data(self) -> int:
        """Devices that hold a copy of the same experts."""
        return self.data * self.tensor // self.expert

    @property
    def num_micro_batches(self) -> int:
        """Passes per optimizer step of each device."""
        return self.batch // (self.data * self.micro_batch)

    @property
    def moment_size(self) -> float:
        """Bytes of one of AdamW's moments; in 8 bits a scale in fp32 comes with every 256 of them."""
        return self.moment_bytes if self.moment_bytes > 1 else 1 + 4 / 256

    @property
    def tokens_per_pass(self) -> int:
        """Tokens of one pass, before they are split over tensor-parallel devices."""
        return self.micro_batch * self.length

    def __str__(self) -> str:
        text = f"DP {self.data} x TP {self.tensor} x PP {self.pipeline}"
        text += f" (VP {self.virtual})" if self.virtual > 1 else ""
        return f"{text}, EP {self.expert}, ZeRO-{self.zero}, recompute {self.recompute}, {self.schedule}"


def check_values(layout: Layout, shape: ModelShape) -> None:
    """Raise a `ValueError` in one line at a value that no layout of this model can have, whatever the others are."""
    for name in ("data", "tensor", "pipeline", "virtual", "expert", "micro_batch", "batch", "length"):
        if getattr(layout, name) < 1:
            raise ValueError(f"{_option(name)}: got {getattr(layout, name)}, expected at least 1")
    for name, allowed in (("recompute", RECOMPUTE), ("schedule", SCHEDULES), ("precision", PRECISIONS)):
        if getattr(layout, name) not in allowed:
            raise ValueError(f"{_option(name)}: got {getattr(layout, name)!r}, expected one of {', '.join(allowed)}")
    if layout.zero not in (0, 1, 2, 3):
        raise ValueError(f"--zero: got {layout.zero}, expected 0, 1, 2 or 3")
    if layout.moment_bytes not in (1, 2, 4):
        raise ValueError(f"--moment-bytes: got {layout.moment_bytes}, expected 1, 2 or 4")
    if layout.expert > 1 and not shape.num_experts:
        raise ValueError(f"--expert: got {layout.expert}, expected 1 (the model has no routed experts)")
    if shape.num_experts and shape.num_experts % layout.expert:
        raise ValueError(f"--expert: got {layout.expert}, expected a divisor of {shape.num_experts} experts")
    if shape.num_heads % layout.tensor:
        raise ValueError(f"--tensor: got {layout.tensor}, expected a divisor of {shape.num_heads} heads")
    if layout.pipeline * layout.virtual > len(shape.layers):
        parts = layout.pipeline * layout.virtual
        raise ValueError(f"--pipeline: got {parts} parts, expected at most {len(shape.layers)} layers")


def check_layout(layout: Layout, shape: ModelShape) -> None:
    """Raise a `ValueError` in one line where a layout cannot hold this model."""
    check_values(layout, shape)
    if layout.zero == 3 and layout.pipeline > 1:
        raise ValueError(
            "--zero: got 3 beside --pipeline, expected one of the two (weights are gathered once per pass)"
        )
    if (layout.data * layout.tensor) % layout.expert:
        raise ValueError(
            f"--expert: got {layout.expert}, expected a divisor of DP x TP = {layout.data * layout.tensor}"
        )
    if layout.virtual > 1 and layout.pipeline == 1:
        raise ValueError(f"--virtual: got {layout.virtual}, expected 1 without --pipeline")
    if layout.schedule == "dualpipe" and (layout.pipeline < 2 or layout.virtual > 1):
        raise ValueError("--schedule: got dualpipe, expected at least 2 pipeline stages and --virtual 1")
    if layout.batch % (layout.data * layout.micro_batch):
        per_pass = layout.data * layout.micro_batch
        raise ValueError(f"--batch: got {layout.batch}, expected a multiple of DP x micro batch = {per_pass}")
    if layout.num_micro_batches < layout.pipeline:
        raise ValueError(
            f"--batch: got {layout.num_micro_batches} passes per step, expected at least the {layout.pipeline} "
            "pipeline stages"
        )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def stages_of(layout: Layout, shape: ModelShape) -> list[list[LayerShape]]:
    """Return the layers of each pipeline stage: parts of equal length, the longer ones first, dealt in turn."""
    parts = layout.pipeline * layout.virtual
    size = ceil(len(shape.layers) / parts)
    num_long = len(shape.layers) - parts * (size - 1)
    stages: list[list[LayerShape]] = [[] for _ in range(layout.pipeline)]
    start = 0
    for part in range(parts):
        end = start + (size if part < num_long else size - 1)
        stages[part % layout.pipeline].extend(shape.layers[start:end])
        start = end
    return stages
