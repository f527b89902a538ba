"""The settings of the align stage.

`align` takes them, the recipes under ``recipes/`` fill them, ``--help`` prints them. Kept apart from the stage so that
reading them imports neither torch nor transformers.
"""

import dataclasses
import math

from deepseek_training.recipes.loading import setting

_AT_LEAST = {
    0: (
        "lora_rank",
        "repetition_penalty",
        "learning_rate",
        "kl_coef",
        "cliprange",
        "cliprange_value",
        "vf_coef",
        "max_grad_norm",
        "missing_eos_penalty",
    ),
    1: (
        "max_prompt_tokens",
        "num_eval_samples",
        "num_updates",
        "batch_size",
        "num_mini_batches",
        "num_ppo_epochs",
        "response_length",
    ),
    8: ("num_eval_prompts",),
}


@dataclasses.dataclass
class AlignRecipe:
    """Settings of the align stage."""

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
    value_model: str | None = setting(
        None, help="sequence classifier with one label to start the value model from; null: the policy and a head of 0"
    )
    lora_rank: int = setting(
        0,
        help="0 trains every weight; above, LoRA of this rank, and the value model shares the policy's frozen weights",
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
    num_updates: int = setting(20, help="PPO updates; at least 1")
    batch_size: int = setting(64, help="prompts played an update, in each process")
    num_mini_batches: int = setting(2, help="optimizer steps a pass over the batch; divides batch_size")
    num_ppo_epochs: int = setting(2, help="passes over each batch")
    response_length: int = setting(40, help="longest completion, in tokens")
    temperature: float = setting(0.9, help="of sampling, above 0")
    learning_rate: float = setting(1e-4, help="of policy and value model; falls linearly to 0")
    lam: float = setting(0.95, help="lambda of the advantage estimate, in [0, 1]; 1: the whole return")
    kl_coef: float = setting(0.05, help="weight of the divergence from the reference; 0 or more")
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
    max_grad_norm: float = setting(1.0, help="gradients are clipped to this norm")
    missing_eos_penalty: float | None = setting(None, help="taken off the score of a completion that does not end")
    min_gain_stderr: float | None = setting(
        2.0, help="target: the held-out reward rises by this many standard errors; null: no target"
    )
    report_to: list[str] | None = setting(  # noqa: RUF009
        None, help="trackers that also get the figures, such as [wandb]; null: trackio, a local one, if installed"
    )
    seed: int = setting(0, help="of prompts' order, sampling and the value head")

    def __post_init__(self) -> None:
        """Check the ranges."""
        for least, names in _AT_LEAST.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and not least <= value < math.inf:
                    raise ValueError(f"{name}={value}: allowed is {least} or more")
        if self.batch_size % self.num_mini_batches:
            raise ValueError(f"num_mini_batches={self.num_mini_batches}: must divide batch_size={self.batch_size}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: allowed is above 0")
        if not 0 <= self.lam <= 1:
            raise ValueError(f"lam={self.lam}: allowed is 0 to 1")
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
        if self.reward_model is not None and (self.weights != [0.7, 0.2, 0.1] or self.gate_threshold not in (None, 1)):
            raise ValueError("reward_model: got weights or gate_threshold with it, expected one of the two rewards")
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            raise ValueError(f"prompt_template={self.prompt_template!r}: it must hold {{prompt}}")
