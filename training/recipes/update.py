"""The settings of `update`: one more text for a finished run, and the bounds under which the result is kept."""

import dataclasses
import math
from typing import Any, ClassVar, Literal

from deepseek_training.recipes.loading import setting
from deepseek_training.recipes.pretrain_and_adapt import EsftSettings, TextSettings

# Taken from the run's own recipe where they are not given.
INHERITED = (
    *("seed", "sequence_length", "batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay"),
    *("adam_beta2", "max_grad_norm", "bias_update_speed", "bf16", "gradient_checkpointing", "experts_implementation"),
    *("eval_bytes", "logging_steps", "save_steps", "report_to", "encoding", "packing", "collective_timeout_s"),
)
_LORA_RANK, _ESFT_TOP_P = 8, 0.2


@dataclasses.dataclass(kw_only=True)
class UpdateRecipe(TextSettings, EsftSettings):
    """The settings of `update`."""

    data: str = setting(help="The new text: embedded name, file, folder, datasets directory or Hub id.")
    data_column: str | None = setting(None, help="Column that holds the text; null: text.")
    general_data: list[str] = setting(  # noqa: RUF009
        [], help="Further texts to replay and to hold the gate to, beside those that the run was trained on."
    )
    general_column: str | None = setting(None, help="Column that holds the text of general_data; null: text.")
    method: Literal["full", "lora", "esft"] = setting(
        "full", help="What trains: every weight, an adapter that is merged, or the experts that the new text goes to."
    )
    epochs: float | None = setting(1.0, help="Passes over the new text; null: max_steps says.")
    replay_share: float = setting(0.4, help="Share of training blocks that are replayed, in [0, 1).")
    replay_blocks: int = setting(2048, help="Blocks of earlier text that the run keeps for replay.")
    alphas: list[float] = setting(  # noqa: RUF009
        [0.25, 0.5, 0.75, 1.0], help="Candidates: how far from the old weights to the trained ones, in (0, 1]."
    )
    ewc_weight: float = setting(0.0, help="Weight of the elastic penalty (EWC) on what earlier text needs; 0: none.")
    ewc_blocks: int = setting(128, help="Replay blocks that the penalty's Fisher information is estimated on.")
    min_gain: float = setting(0.0, help="The new text's bits per byte must fall by this share,")
    gain_errors: float = setting(2.0, help="and by so many paired standard errors beyond it.")
    max_loss: float = setting(0.02, help="Bits per byte of any earlier text may rise by this share,")
    loss_errors: float = setting(
        1.0,
        help="and by so many paired standard errors beyond it; below 0: must stay so many errors under it.",
    )
    min_order_errors: float | None = setting(
        2.0,
        help="The new text must be likelier than itself with its words shuffled, by so many errors; null: not asked.",
    )
    max_unsafe_share: float | None = setting(
        0.2, help="Share of the new text's passages that the safety classifier may call unsafe; null: not asked."
    )
    max_safety_loss: float | None = setting(
        0.05,
        help="By how much the mean safety of what the model writes may fall, beside loss_errors standard errors; "
        "null: not asked.",
    )
    safety_prompts: int = setting(32, help="Beginnings of held-out texts that old and new model continue for that.")
    unused: ClassVar[dict[str, str]] = {
        "eval_steps": "the gate measures at the end",
        "sample_prompts": "the gate has its own prompts",
        "sample_tokens": "the gate has its own prompts",
        "sample_steps": "the gate has its own prompts",
        **dict.fromkeys(("expert_parallel_size", "save_in_background"), "an update runs in one process"),
    }

    def __post_init__(self) -> None:
        if self.method == "lora" and self.lora_rank == 0:
            self.lora_rank = _LORA_RANK
        if self.method == "esft" and self.esft_top_p is None:
            self.esft_top_p = _ESFT_TOP_P
        super().__post_init__()
        self.require("lora_rank", self.method == "lora" or self.lora_rank == 0, "0 without method=lora")
        self.require("esft_top_p", self.method == "esft" or self.esft_top_p is None, "null without method=esft")
        self.require("replay_share", 0 <= self.replay_share < 1, "in [0, 1)")
        self.require("replay_blocks", self.replay_blocks >= 1, "at least 1")
        is_between = bool(self.alphas) and all(0 < alpha <= 1 for alpha in self.alphas)
        self.require("alphas", is_between and len(set(self.alphas)) == len(self.alphas), "different numbers in (0, 1]")
        self.require("ewc_weight", 0 <= self.ewc_weight < math.inf, "at least 0, and finite")
        self.require("ewc_weight", not self.ewc_weight or self.method == "full", "0 without method=full")
        self.require("ewc_weight", not self.ewc_weight or self.replay_blocks > 0, "0 without replay")
        self.require("ewc_blocks", self.ewc_blocks >= 1, "at least 1")
        self.require("min_gain", 0 <= self.min_gain < 1, "in [0, 1)")
        self.require("gain_errors", 0 <= self.gain_errors < math.inf, "at least 0, and finite")
        self.require("max_loss", 0 < self.max_loss < math.inf, "above 0, and finite")
        self.require("loss_errors", math.isfinite(self.loss_errors), "a finite number")
        for name in ("min_order_errors", "max_safety_loss"):
            value = getattr(self, name)
            self.require(name, value is None or 0 <= value < math.inf, "null or at least 0, and finite")
        self.require("max_unsafe_share", self.max_unsafe_share is None or 0 <= self.max_unsafe_share <= 1, "in [0, 1]")
        self.require("safety_prompts", self.safety_prompts >= 8, "at least 8")


def inherit(settings: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return an update's settings: those given, else of the run itself.

    Args:
        settings: Of the run's recipe.
        overrides: What was given.
    """
    found = {name: settings[name] for name in INHERITED if name in settings}
    if overrides.get("method") == "esft":
        found["bias_update_speed"] = None
    if "max_steps" in overrides and "epochs" not in overrides:
        found["epochs"] = None
    return {**found, **overrides}
