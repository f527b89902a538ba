"""The settings of the align stage.

`align` takes them, the recipes under ``recipes/`` fill them, ``--help`` prints them. Kept apart from the stage so that
reading them imports neither torch nor transformers.
"""

import dataclasses
import math

from deepseek_training.recipes.loading import setting
from deepseek_training.recipes.rewarded import RewardedSettings, require_at_least

_AT_LEAST = {
    0: ("cliprange", "cliprange_value", "vf_coef", "missing_eos_penalty", "sample_steps"),
    1: ("num_mini_batches", "num_ppo_epochs"),
}


@dataclasses.dataclass(kw_only=True)
class AlignRecipe(RewardedSettings):
    """Settings of the align stage."""

    value_model: str | None = setting(
        None, help="sequence classifier with one label to start the value model from; null: the policy and a head of 0"
    )
    lora_rank: int = setting(
        0,
        help="0 trains every weight; above, LoRA of this rank, and the value model shares the policy's frozen weights",
    )
    batch_size: int = setting(64, help="prompts played an update, in each process")
    num_mini_batches: int = setting(2, help="optimizer steps per pass over the batch; divides batch_size")
    num_ppo_epochs: int = setting(2, help="passes over each batch")
    learning_rate: float = setting(1e-4, help="of policy and value model; falls linearly to 0")
    lam: float = setting(0.95, help="lambda of the advantage estimate, in [0, 1]; 1: the whole return")
    target_kl: float | None = setting(
        None,
        help="KL per completion, in nats, to which kl_coef adapts by up to a fifth per update; null: it is fixed",
    )
    stop_kl: float | None = setting(
        None, help="training ends after an update whose completions are further away, in nats; null: it never does"
    )
    cliprange: float = setting(0.2, help="the policy's probability ratio is clipped to 1 plus or minus this")
    cliprange_value: float = setting(0.2, help="the value's change is clipped to this")
    vf_coef: float = setting(0.5, help="weight of the value loss")
    sample_steps: int = setting(
        0, help="updates between completions of a few held-out prompts, for the report; 0: before and after only"
    )
    missing_eos_penalty: float | None = setting(None, help="taken off the score of a completion that does not end")

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require_at_least(self, _AT_LEAST)
        if self.batch_size % self.num_mini_batches:
            raise ValueError(
                f"num_mini_batches: got {self.num_mini_batches}, expected a divisor of batch_size={self.batch_size}"
            )
        if not 0 <= self.lam <= 1:
            raise ValueError(f"lam: got {self.lam}, expected 0 to 1")
        if self.lora_rank and self.value_model is not None:
            raise ValueError(
                f"value_model={self.value_model}: with lora_rank={self.lora_rank} it shares the policy's weights; "
                "leave it null"
            )
        for name in ("target_kl", "stop_kl"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: got {value}, expected null or a number above 0")
        if self.target_kl is not None and self.kl_coef == 0:
            raise ValueError("kl_coef: got 0 with target_kl, expected a number above 0, which can grow")
