"""The settings of `quantize`, which trains nothing and so has no recipe file: the command's options fill them."""

import dataclasses
from typing import Literal

from deepseek_training.recipes.loading import setting


@dataclasses.dataclass(kw_only=True)
class QuantizeSettings:
    """Which model's experts to put into 4 bits, how, and by what text."""

    model: str = setting(help="the model to quantize: a folder or Hub id")
    bits: int = setting(4, help="bits per weight of the routed experts; 4")
    group_size: int = setting(128, help="weights along the input that share a scale: divides hidden and expert width")
    grid: int = setting(20, help="scales of channels tried beside the identity; 0: none")
    clip: bool = setting(
        True, help="search each group's scale, of either sign, by the error; small ones cut off its largest weights"
    )
    feedback: bool = setting(
        False, help="round column after column, each making up for the errors of those before it (GPTQ); slower"
    )
    scales: Literal["float", "power_of_two"] = setting(
        "float", help="kind of the channels' scales: with power_of_two folding them changes no bit of the function"
    )
    format: Literal["pack-quantized"] = setting("pack-quantized", help="on disk: compressed-tensors' pack-quantized")
    data: str = setting("books", help="calibration text: embedded name, file, folder or Hub id")
    data_column: str | None = setting(None, help="column that holds the text")
    calibration_tokens: int = setting(16384, help="tokens of it that are read")
    sequence_length: int = setting(256, help="tokens of a block")
    batch_size: int = setting(8, help="blocks of a forward pass")
    eval_bytes: int | None = setting(
        40_000, help="bytes of the held-out text on which the model is scored before and after"
    )
    max_loss: float = setting(0.02, help="target: by which share bits per byte may rise")

    def __post_init__(self) -> None:
        if self.bits != 4:
            raise ValueError(f"bits: got {self.bits}, expected 4; readers of {self.format} here take no other")
        least = {"group_size": 8, "grid": 0, "calibration_tokens": 1, "sequence_length": 4, "batch_size": 1}
        for name, number in {**least, "eval_bytes": 1000, "max_loss": 0}.items():
            value = getattr(self, name)
            if value is not None and not value >= number:
                raise ValueError(f"{name}: got {value}, expected at least {number}")
