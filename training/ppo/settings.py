"""PPO's settings: TRL's own class where TRL has one, and the same fields and defaults where it has none.

TRL deleted its PPO in 1.13 (trl#7020). The fields below are those of TRL 1.12's `PPOConfig` that this trainer reads or
fills in, so that settings written for one work with the other.
"""

import dataclasses
from typing import Literal

from transformers import TrainingArguments


@dataclasses.dataclass
class OwnPPOConfig(TrainingArguments):
    """The settings of PPO, for a TRL without them.

    Attributes:
        num_mini_batches: Optimizer steps per pass over a batch.
        total_episodes: Completions of the whole training; None: `num_train_epochs` passes over the prompts.
        local_rollout_forward_batch_size: Prompts of one process that are generated and scored at a time.
        num_sample_generations: How often held-out prompts are completed and printed.
        response_length: Tokens of a completion at most.
        stop_token: "eos" ends a completion at the tokenizer's eos; None: at `stop_token_id`, if that is set.
        stop_token_id: The token that ends a completion.
        temperature: Of the sampling; the logits are divided by it.
        missing_eos_penalty: Taken from the score of a completion that did not end by itself.
        world_size: Processes; filled in.
        num_total_batches: Updates; filled in.
        micro_batch_size: Prompts of one forward pass in all processes; filled in.
        local_batch_size: Prompts of an update in one process; filled in.
        batch_size: Prompts of an update; filled in.
        local_mini_batch_size: Prompts of an optimizer step in one process; filled in.
        mini_batch_size: Prompts of an optimizer step; filled in.
        model_adapter_name: The trained adapter, where a policy has several.
        ref_adapter_name: The reference's adapter, where a policy has several.
        num_ppo_epochs: Passes over each batch.
        whiten_rewards: Whether rewards are divided by their spread.
        kl_coef: Weight of the divergence from the reference.
        kl_estimator: "k1" is the log-ratio; "k3" is less noisy and never negative.
        cliprange: The ratio's clip.
        vf_coef: Weight of the value loss.
        cliprange_value: The values' clip.
        gamma: Discount per token.
        lam: Lambda of generalized advantage estimation.
        ds3_gather_for_generation: Whether ZeRO-3 gathers the weights to generate.
    """

    # TRL's defaults where they differ from transformers'
    learning_rate: float = 3e-6
    logging_steps: float = 10
    gradient_checkpointing: bool = True
    bf16: bool | None = None

    num_mini_batches: int = 1
    total_episodes: int | None = None
    local_rollout_forward_batch_size: int = 64
    num_sample_generations: int = 10
    response_length: int = 53
    stop_token: Literal["eos"] | None = None
    stop_token_id: int | None = None
    temperature: float = 0.7
    missing_eos_penalty: float | None = None
    world_size: int | None = None
    num_total_batches: int | None = None
    micro_batch_size: int | None = None
    local_batch_size: int | None = None
    batch_size: int | None = None
    local_mini_batch_size: int | None = None
    mini_batch_size: int | None = None
    model_adapter_name: str | None = None
    ref_adapter_name: str | None = None
    num_ppo_epochs: int = 4
    whiten_rewards: bool = False
    kl_coef: float = 0.05
    kl_estimator: Literal["k1", "k3"] = "k1"
    cliprange: float = 0.2
    vf_coef: float = 0.1
    cliprange_value: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    ds3_gather_for_generation: bool = True

    def __post_init__(self) -> None:
        """Take bf16 unless fp16 is asked for, as TRL does."""
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        super().__post_init__()


try:
    from trl.experimental.ppo import PPOConfig
except ImportError:  # TRL 1.13 and later
    OwnPPOConfig.__name__ = OwnPPOConfig.__qualname__ = "PPOConfig"
    PPOConfig = OwnPPOConfig
