"""The settings of the dpo stage."""

import dataclasses
import math
from typing import ClassVar

from deepseek_training.recipes.loading import setting
from deepseek_training.recipes.pretrain_and_adapt import LoraSettings


@dataclasses.dataclass(kw_only=True)
class DpoRecipe(LoraSettings):
    """The settings of `dpo`."""

    data: str = setting(help="Pairs of answers: a file, folder, datasets directory or Hub id.")
    prompt_column: str = setting(
        "prompt", help="Column that holds what is asked, a text or messages; left out where the answers begin with it."
    )
    chosen_column: str = setting("chosen", help="Column that holds the better answer, a text or messages.")
    rejected_column: str = setting("rejected", help="Column that holds the worse answer, a text or messages.")
    chat_template: str | None = setting(
        None, help="File with a Jinja chat template, saved with the tokenizer; null: the tokenizer's own."
    )
    unused: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("sample_prompts", "sample_tokens", "sample_steps"), "no text is written"),
        "eval_bytes": "num_eval_pairs says what is scored",
    }
    beta: float = setting(0.1, help="Weight of the divergence from the reference, above 0.")
    num_eval_pairs: int | None = setting(None, help="Held-out pairs that are scored; null: all.")
    min_accuracy: float | None = setting(
        0.5, help="Target: the share of held-out pairs whose better answer gains is above this; null: no target."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("beta", 0 < self.beta < math.inf, "above 0, and finite")
        self.require("num_eval_pairs", self.num_eval_pairs is None or self.num_eval_pairs >= 2, "null or at least 2")
        self.require("min_accuracy", self.min_accuracy is None or 0 <= self.min_accuracy < 1, "null or in [0, 1)")
