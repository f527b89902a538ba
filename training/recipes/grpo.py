"""The settings of the grpo stage."""

import dataclasses

from deepseek_training.recipes.loading import setting
from deepseek_training.recipes.rewarded import RewardedSettings, require_at_least


@dataclasses.dataclass(kw_only=True)
class GrpoRecipe(RewardedSettings):
    """Settings of the grpo stage."""

    batch_size: int = setting(64, help="completions per update, in each process; a multiple of num_generations")
    num_generations: int = setting(8, help="completions of each prompt, which are compared; at least 2")
    num_iterations: int = setting(1, help="optimizer steps on each batch of completions; at least 1")
    cliprange: float = setting(0.2, help="the policy's probability ratio is clipped to 1 plus or minus this")
    bias_update_speed: float | None = setting(
        None, help="step of the experts' balancing bias; null: the model's router_bias_update_speed"
    )
    lora_alpha: float | None = setting(None, help="LoRA's weight; null: twice lora_rank")
    lora_targets: list[str] | None = setting(  # noqa: RUF009
        None, help="what gets an adapter; null: attention and routed experts, of a dense model every linear layer"
    )
    save_steps: int = setting(10, help="optimizer steps between checkpoints; 0: none")

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require_at_least(self, {0: ("cliprange", "bias_update_speed", "save_steps"), 1: ("num_iterations",)})
        require_at_least(self, {2: ("num_generations",)})
        if self.batch_size % self.num_generations:
            raise ValueError(f"batch_size: got {self.batch_size}, expected a multiple of {self.num_generations}")
