"""The settings of the distill stage."""

import dataclasses
import math
from typing import Any, Literal

from deepseek_training.recipes.loading import setting
from deepseek_training.recipes.pretrain_and_adapt import SplittableSettings


@dataclasses.dataclass(kw_only=True)
class DistillRecipe(SplittableSettings):
    """The settings of `distill`."""

    teacher: str = setting(help="The model to learn from: a folder or Hub id. Its tokenizer is the student's too.")
    start: str = setting(
        "shrink",
        help="Where the student comes from: shrink cuts it out of the teacher, fresh begins anew, else a model: a "
        "folder or Hub id.",
    )
    student: dict[str, Any] = setting(  # noqa: RUF009
        {}, help="Settings of the teacher's configuration that the student has otherwise; with shrink and fresh."
    )
    experts_by: Literal["reap", "frequency"] = setting(
        "reap", help="Which experts shrink keeps: those with the largest outputs (reap), or the most used (frequency)."
    )
    calibration_tokens: int = setting(8192, help="Training tokens that tell shrink what matters in the teacher.")
    data: str = setting("books", help="Text to train on, named as for pretrain.")
    data_column: str | None = setting(None, help="Column that holds the text; null: text.")
    distill_weight: float = setting(
        0.5, help="Weight of the divergence from the teacher against the cross-entropy, in [0, 1]; 0: no teacher."
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = setting(
        "forward_kl", help="forward_kl, reverse_kl, or jsd, a mixture of both."
    )
    beta: float | None = setting(
        None, help="The teacher's share in jsd's mixture, in (0, 1); null: 0.5. With jsd only."
    )
    temperature: float = setting(1.0, help="Divides the logits of both models before they are compared, above 0.")
    cache: str | None = setting(
        None, help="Folder for the teacher's distributions, made once and read by later runs; null: the teacher runs."
    )
    cache_top_k: int = setting(
        64, help="Tokens per position that the cache keeps; the others count together as one. At least 1."
    )
    min_gap_closed: float | None = setting(
        None,
        help="Target: the share of the way from the start's bits per byte to the teacher's that must be made; null: "
        "no target.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("distill_weight", 0 <= self.distill_weight <= 1, "in [0, 1]")
        self.require("temperature", 0 < self.temperature < math.inf, "above 0, and finite")
        is_jsd = self.divergence == "jsd"
        self.require("beta", self.beta is None or is_jsd, f"null with divergence={self.divergence}")
        self.require("beta", self.beta is None or 0 < self.beta < 1, "null or in (0, 1)")
        self.require("cache_top_k", self.cache_top_k >= 1, "at least 1")
        self.require("cache", self.cache is None or self.distill_weight > 0, "null with distill_weight=0")
        self.require(
            "student", not self.student or self.start in ("shrink", "fresh"), f"empty with start={self.start}"
        )
        self.require("calibration_tokens", self.calibration_tokens >= 1, "at least 1")
