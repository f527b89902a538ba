"""What `align` and `grpo` ask alike: prompts, reward, how to sample and how to measure."""

import dataclasses
import math

from deepseek_training.recipes.bounds import require_at_least
from deepseek_training.recipes.loading import setting

_AT_LEAST = {
    0: ("lora_rank", "repetition_penalty", "learning_rate", "kl_coef", "max_grad_norm"),
    1: ("max_prompt_tokens", "num_eval_samples", "num_updates", "batch_size", "response_length"),
    8: ("num_eval_prompts",),
}


@dataclasses.dataclass(kw_only=True)
class RewardedSettings:
    """Settings of the stages that learn from a reward."""

    model: str = setting(help="the policy to start from: local path or Hub id, with its tokenizer")
    prompts: str = setting("dialogues", help="embedded name, file, folder or Hub id of prompts")
    prompt_column: str | None = setting(
        None, help="column with the prompts; by default 'text', or 'prompt' where there is no 'text'"
    )
    prompt_sources: list[str] = setting([], help="keep the rows whose `source` is one of these; empty: all rows")  # noqa: RUF009
    prompt_template: str | None = setting(
        "{prompt}\n", help="how a prompt is put to the model; null uses the tokenizer's chat template"
    )
    experts_implementation: str | None = setting(
        "fused_moe", help="how experts are computed: fused_moe, grouped_mm, eager; null leaves it to transformers"
    )
    max_prompt_tokens: int = setting(96, help="longer prompts are refused; at least 1")
    num_eval_prompts: int = setting(192, help="held-out prompts scored before and after; at least 8")
    num_eval_samples: int = setting(1, help="completions of each held-out prompt, whose mean counts; at least 1")
    reward_model: str | None = setting(
        None,
        help="sequence classifier with one label whose score is the reward in place of weights and gate: folder or "
        "Hub id, with its tokenizer, by whose chat template, if it has one, it reads prompt and completion",
    )
    weights: list[float] = setting([0.7, 0.2, 0.1], help="of relevance, safety, diversity; 0 or more")  # noqa: RUF009
    gate_threshold: float | None = setting(
        1.0, help="below this safety the whole reward shrinks in proportion, in (0, 1]; null: no gate"
    )
    repetition_penalty: float = setting(
        0.0, help="most that repeated token triples take off the reward, 0 or more (trl.rewards)"
    )
    is_standardized: bool = setting(False, help="put each reward on one scale, so that the weights alone weigh")
    num_updates: int = setting(20, help="updates, each on completions of its own; at least 1")
    batch_size: int = setting(64, help="prompts played an update, in each process")
    response_length: int = setting(40, help="longest completion, in tokens")
    temperature: float = setting(0.9, help="of sampling, above 0")
    router_replay: bool = setting(
        False,
        help="of a MoE: learn from a rollout with the very experts it used, which in bf16 may be chosen otherwise",
    )
    learning_rate: float = setting(1e-4, help="falls linearly to 0")
    kl_coef: float = setting(0.05, help="weight of the divergence from the reference; 0 or more")
    lora_rank: int = setting(0, help="0 trains every weight; above, LoRA of this rank on frozen weights")
    max_grad_norm: float = setting(1.0, help="gradients are clipped to this norm")
    min_gain_stderr: float | None = setting(
        2.0, help="target: the held-out reward rises by this many standard errors; null: no target"
    )
    report_to: list[str] | None = setting(  # noqa: RUF009
        None, help="trackers that also get the figures, such as [wandb]; null: trackio, a local one, if installed"
    )
    seed: int = setting(0, help="of prompts' order, sampling and new weights")

    def __post_init__(self) -> None:
        """Check the ranges."""
        require_at_least(self, _AT_LEAST)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: got {self.temperature}, expected above 0")
        if self.reward_model is not None and (self.weights != [0.7, 0.2, 0.1] or self.gate_threshold not in (None, 1)):
            raise ValueError("reward_model: got weights or gate_threshold with it, expected one of the two rewards")
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            raise ValueError(f"prompt_template: got {self.prompt_template!r}, expected a text that holds {{prompt}}")
