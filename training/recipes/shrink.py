"""The settings of `shrink`, which trains nothing and so has no recipe file: the command's options fill them."""

import dataclasses
from typing import Any, Literal

from deepseek_training.recipes.loading import setting


@dataclasses.dataclass(kw_only=True)
class ShrinkSettings:
    """What to cut out of which model, and by what text."""

    model: str = setting(help="the model to cut: a folder or Hub id")
    student: dict[str, Any] = setting({}, help="settings of its configuration that the smaller one has otherwise")  # noqa: RUF009
    experts_by: Literal["reap", "frequency"] = setting(
        "reap", help="which experts are kept: those with the largest outputs (reap), or the most used (frequency)"
    )
    data: str = setting("books", help="text that tells what matters: embedded name, file, folder or Hub id")
    data_column: str | None = setting(None, help="column that holds the text")
    calibration_tokens: int = setting(8192, help="tokens of it that are read")
    sequence_length: int = setting(256, help="tokens of a block")
    batch_size: int = setting(8, help="blocks of a forward pass")
    eval_bytes: int | None = setting(
        40_000, help="bytes of the held-out text on which the model is scored before and after"
    )

    def __post_init__(self) -> None:
        least = {"calibration_tokens": 1, "sequence_length": 4, "batch_size": 1, "eval_bytes": 1000}
        for name, number in least.items():
            value = getattr(self, name)
            if value is not None and value < number:
                raise ValueError(f"{name}: got {value}, expected at least {number}")
