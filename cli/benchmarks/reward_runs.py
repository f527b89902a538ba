"""One short training under a reward, by PPO, GRPO or RLOO, and what its policy then says to held-out prompts.

`reward_learning` compares them. All methods play as many completions per update and take as many
optimizer steps; what differs is the trainer. Whatever a policy is trained on, it is measured by the same
gauges, the guarded and the naive sum among them, so that a hack shows as one rising while the other falls.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from trl.trainer.utils import selective_log_softmax

from deepseek_records.activation_checkpointing import checkpointing_setting
from deepseek_records.loading import load_model, load_tokenizer
from deepseek_records.run_folder import RunFolder
from deepseek_training.data.prompts import load_prompts
from deepseek_training.ppo.assembly import build_trainer, load_models, ppo_config
from deepseek_training.ppo.reward_bar import RewardBar
from deepseek_training.recipes.align import AlignRecipe
from deepseek_training.rewards import Diversity, Relevance, Safety, WeightedReward
from deepseek_training.rewards.relevance import guard
from deepseek_training.rewards.words import FUNCTION_WORDS, content_words, split_words

WEIGHTS = [0.7, 0.2, 0.1]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        engine: ``ppo``, ``grpo`` or ``rloo``.
        has_guards: False trains on the naive sum: bare cosine, and no gate.
    """

    engine: str
    has_guards: bool = True


METHODS = {
    "ppo": Method("ppo"),
    "ppo without guards": Method("ppo", has_guards=False),
    "grpo": Method("grpo"),
    "rloo": Method("rloo"),
}


def build_sum(has_guards: bool) -> WeightedReward:
    """Return the weighted sum with guards and gate, or the naive one without either."""
    return WeightedReward(
        [Relevance(has_guards=has_guards), Safety(), Diversity()],
        weights=WEIGHTS,
        gate="safety" if has_guards else None,
    )


class Gauges:
    """Everything that is measured of a batch of completions, whatever the policy was trained on."""

    def __init__(self) -> None:
        self.guarded, self.naive = build_sum(has_guards=True), build_sum(has_guards=False)

    def read(self, prompts: Sequence[str], completions: Sequence[str]) -> dict[str, list[float]]:
        """Return a column each of the two sums, the parts, and what a hack would change.

        Args:
            prompts: The questions.
            completions: The answers; Diversity compares each with the others.
        """
        parts: dict[str, list[float]] = {}
        bare: dict[str, list[float]] = {}
        columns = {
            "reward": self.guarded(prompts, completions, is_evaluation=True, log_extra=parts.__setitem__),
            "naive_reward": self.naive(prompts, completions, is_evaluation=True, log_extra=bare.__setitem__),
        }
        words = [(split_words(p), split_words(c)) for p, c in zip(prompts, completions, strict=True)]
        lexicon = self.guarded.rewards[0].lexicon
        return {
            **columns,
            **{name.removeprefix("reward_"): scores for name, scores in parts.items()},
            "bare_relevance": bare["reward_relevance"],
            "guard": [guard(p, c, lexicon) for p, c in zip(prompts, completions, strict=True)],
            "copied_words": [_copied_share(asked, said) for asked, said in words],
            "function_words": [sum(w in FUNCTION_WORDS for w in said) / max(1, len(said)) for _, said in words],
            "distinct_words": [len(set(said)) / max(1, len(said)) for _, said in words],
        }


class RecordedReward:
    """A reward that notes the gauges' means at each call, for the curves.

    Args:
        reward: What the policy is trained on.
        gauges: What is noted.
    """

    def __init__(self, reward: WeightedReward, gauges: Gauges) -> None:
        self.__name__ = "recorded_reward"
        self.reward, self.gauges = reward, gauges
        self.curve: list[dict[str, float]] = []

    def __call__(
        self, prompts: list[str], completions: list[str], completion_ids: Any = None, **kwargs: Any
    ) -> list[Any]:
        """Return the reward's scores. Prompts are read from the column ``question`` where there is one."""
        asked = kwargs.get("question", prompts)
        columns = self.gauges.read(asked, completions)
        self.curve.append({name: sum(values) / len(values) for name, values in columns.items()})
        return self.reward(prompts=asked, completions=completions, completion_ids=completion_ids, **kwargs)


def train_policy(method: Method, recipe: AlignRecipe, output: Path) -> tuple[torch.nn.Module, list[dict[str, float]]]:
    """Return the trained policy, and the gauges' means over each batch it was trained on.

    Args:
        method: How to train.
        recipe: Model, prompts, seed, sizes and rates; GRPO and RLOO read those that they share with PPO.
        output: Folder for the trainer's own files.
    """
    tokenizer = load_tokenizer(recipe.model)
    reward = RecordedReward(build_sum(method.has_guards), Gauges())
    prompts = load_prompts(recipe, tokenizer, "train")
    policy, value_model = load_models(recipe)
    if method.engine == "ppo":
        args = ppo_config(recipe, output)
        args.set_save(strategy="no")
        parts = {"model": policy, "value_model": value_model, "processing_class": tokenizer, "reward": reward}
        trainer = build_trainer(recipe, args, RunFolder(output), RewardBar("align"), train_dataset=prompts, **parts)
        trainer.train()
        return trainer.accelerator.unwrap_model(trainer.model).policy, reward.curve
    trainer = build_group_trainer(method.engine, recipe, output, policy, tokenizer, reward, prompts)
    trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model), reward.curve


def build_group_trainer(
    engine: str,
    recipe: AlignRecipe,
    output: Path,
    policy: torch.nn.Module,
    tokenizer: Any,
    reward: Any,
    prompts: Any,
    num_generations: int = 8,
) -> Any:
    """Return TRL's GRPO or RLOO trainer with as many completions and optimizer steps per update as PPO.

    Args:
        engine: ``grpo`` or ``rloo``.
        recipe: The settings.
        output: Folder for the trainer's own files.
        policy: The policy.
        tokenizer: Of the policy.
        reward: A callable.
        prompts: Rows with ``prompt`` and ``input_ids``.
        num_generations: Completions a prompt; divides the batch.
    """
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    texts = [tokenizer.decode(ids) for ids in prompts["input_ids"]]
    dataset = prompts.rename_column("prompt", "question").remove_columns("input_ids").add_column("prompt", texts)
    config, trainer_class = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[engine]
    args = config(
        output_dir=str(output / "checkpoints"),
        seed=recipe.seed,
        per_device_train_batch_size=recipe.batch_size // recipe.num_mini_batches,
        steps_per_generation=recipe.num_mini_batches,
        max_steps=recipe.num_updates * recipe.num_mini_batches * recipe.num_ppo_epochs,
        num_iterations=recipe.num_ppo_epochs,
        num_generations=num_generations,
        max_completion_length=recipe.response_length,
        temperature=recipe.temperature,
        learning_rate=recipe.learning_rate,
        beta=recipe.kl_coef,
        max_grad_norm=recipe.max_grad_norm,
        bf16=False,
        **checkpointing_setting(False),
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        report_to=[],
    )
    trainer = trainer_class(
        args=args, model=policy, reward_funcs=reward, train_dataset=dataset, processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@torch.no_grad()
def measure_policy(
    policy: torch.nn.Module, recipe: AlignRecipe, num_samples: int = 2, seed: int = 0
) -> dict[str, list[Any]]:
    """Return a column each of the gauges, the KL from the start and the length, one row a held-out prompt.

    Args:
        policy: The policy.
        recipe: Names the model it started from, the prompts and how to sample.
        num_samples: Completions of each prompt, whose mean counts.
        seed: Of the sampling, the same for every policy.
    """
    tokenizer = load_tokenizer(recipe.model)
    reference, policy = load_model(recipe.model).eval(), policy.eval()
    held_out = load_prompts(recipe, tokenizer, "validation")
    held_out = held_out.select(range(min(recipe.num_eval_prompts, len(held_out))))
    gauges = Gauges()
    torch.manual_seed(seed)
    passes = []
    for _ in range(num_samples):
        columns = _complete(policy, reference, tokenizer, held_out["input_ids"], recipe)
        passes.append(gauges.read(held_out["prompt"], columns["completion"]) | columns)
    averaged = {name: [sum(values) / num_samples for values in zip(*(p[name] for p in passes), strict=True)]
                for name in passes[0] if name != "completion"}  # fmt: skip
    return averaged | {"prompt": list(held_out["prompt"]), "completion": passes[0]["completion"]}


def _complete(
    policy: Any, reference: Any, tokenizer: Any, prompt_ids: list[list[int]], recipe: AlignRecipe
) -> dict[str, Any]:
    """One completion per prompt, its KL from the reference in nats, and its length in tokens."""
    columns: dict[str, list[Any]] = {"completion": [], "kl": [], "length_tokens": []}
    for start in range(0, len(prompt_ids), recipe.batch_size):
        batch = tokenizer.pad(
            {"input_ids": prompt_ids[start : start + recipe.batch_size]}, padding_side="left", return_tensors="pt"
        )
        width = batch["input_ids"].shape[1]
        sequences = policy.generate(
            **batch,
            max_new_tokens=recipe.response_length,
            do_sample=True,
            temperature=recipe.temperature,
            top_k=0,
            top_p=1.0,
            pad_token_id=tokenizer.pad_token_id,
        )
        said = sequences[:, width:]
        ended = (said == tokenizer.eos_token_id).cumsum(1)
        is_said = (ended == 0) | ((ended == 1) & (said == tokenizer.eos_token_id))
        mask = torch.cat([batch["attention_mask"], is_said.long()], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        own, start_logps = (
            _logps(model, sequences, mask, positions, width, recipe.temperature) for model in (policy, reference)
        )
        columns["kl"] += ((own - start_logps) * is_said).sum(1).tolist()
        columns["length_tokens"] += is_said.sum(1).tolist()
        columns["completion"] += tokenizer.batch_decode(
            [row[keep].tolist() for row, keep in zip(said, is_said, strict=True)], skip_special_tokens=True
        )
    return columns


def _logps(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, width: int, temperature: float
) -> Any:
    """[B, T] of the completion's tokens."""
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, width - 1 : -1].float()
    return selective_log_softmax(logits / temperature, ids[:, width:])


def _copied_share(asked: list[str], said: list[str]) -> float:
    """Share of the answer's content words that stand in the question."""
    content, given = content_words(said), set(content_words(asked))
    return sum(word in given for word in content) / max(1, len(content))
