"""The estimate held against runs that others have published: `deepseek-moe plan --check`.

The rows and their sources are in `published_runs.yaml`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml
from transformers import AutoConfig

from deepseek_training.launch.cluster.devices import Device, find_device
from deepseek_training.launch.cluster.layout import Layout, check_layout
from deepseek_training.launch.cluster.shape import ModelShape, read_shape
from deepseek_training.launch.cluster.step_estimate import RATES, Rates, StepTime, estimate_step


@dataclass(frozen=True)
class PublishedRun:
    """One row.

    Attributes:
        name: What was trained and by whom.
        source: Where it was published.
        shape: The model.
        device: The accelerator.
        layout: How it was divided; what the source does not say is our reading.
        flops_per_second: Useful FLOP/s per device, as published or from the published tokens.
    """

    name: str
    source: str
    shape: ModelShape
    device: Device
    layout: Layout
    flops_per_second: float

    def estimate(self, rates: Rates = RATES) -> StepTime:
        """Return what the plan says of it."""
        return estimate_step(self.shape, self.layout, self.device, rates)

    def ratio(self, rates: Rates = RATES) -> float:
        """Return the estimate over what was published; over 1 is too fast."""
        return self.estimate(rates).flops_per_second / self.flops_per_second


def published_runs() -> Iterator[PublishedRun]:
    """Yield the rows."""
    text = (resources.files("deepseek_training.launch.cluster") / "published_runs.yaml").read_text(encoding="utf-8")
    table = yaml.safe_load(text)
    shapes = {name: _read_model(name, settings) for name, settings in table["models"].items()}
    for row in table["runs"]:
        shape, layout = shapes[row["model"]], Layout(**row["layout"])
        check_layout(layout, shape)
        if "tflops" in row:
            flops = row["tflops"] * 1e12
        else:
            flops = row["tokens_per_second"] * shape.flops_per_token(layout.length)
        yield PublishedRun(row["name"], row["source"], shape, find_device(row["gpu"]), layout, flops)


def _read_model(name: str, settings: dict[str, Any]) -> ModelShape:
    settings = dict(settings)
    return read_shape(AutoConfig.for_model(settings.pop("model_type"), **settings), name)


def typical_error(ratios: list[float]) -> float:
    """Return the factor within which an estimate lies, one standard deviation: exp of the root mean square log."""
    return math.exp(math.sqrt(sum(math.log(ratio) ** 2 for ratio in ratios) / len(ratios)))
