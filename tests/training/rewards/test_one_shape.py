"""PPO, GRPO and RLOO call a reward alike: strings or conversations, token ids and the data's other columns."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from ppo_parts import make_models, make_prompts, make_tokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from deepseek_training.ppo.settings import PPOConfig
from deepseek_training.ppo.trainer import CorrectedPPOTrainer
from deepseek_training.rewards import Diversity, Relevance, Safety, WeightedReward

TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"


class Recorder:
    """The weighted reward, and what it was called with."""

    def __init__(self) -> None:
        self.__name__ = "recorder"
        self.reward = WeightedReward([Relevance(), Safety(), Diversity()], [0.7, 0.2, 0.1])
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **kwargs: Any) -> list[float | None]:
        self.calls.append(kwargs)
        return self.reward(**kwargs)


def train(engine: str, rows: Dataset, reward: Recorder, folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    policy, value = make_models()
    common: dict[str, Any] = dict(output_dir=str(folder), per_device_train_batch_size=4, report_to="none", seed=0)
    common |= dict(bf16=False, gradient_checkpointing=False, use_cpu=True, save_strategy="no")
    if engine == "ppo":
        args = PPOConfig(**common, total_episodes=4, response_length=4, num_ppo_epochs=1, num_sample_generations=0)
        CorrectedPPOTrainer(
            args=args,
            processing_class=tokenizer,
            model=policy,
            value_model=value,
            reward=reward,
            train_dataset=rows,
        ).train()
        return
    config, trainer = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[engine]
    args = config(**common, beta=0.0, max_steps=1, num_generations=2, max_completion_length=4)
    trainer(
        model=policy,
        reward_funcs=reward,
        args=args,
        train_dataset=rows.remove_columns("input_ids"),
        processing_class=tokenizer,
    ).train()


@pytest.mark.parametrize("is_chat", [False, True], ids=["strings", "conversations"])
@pytest.mark.parametrize("engine", ["ppo", "grpo", "rloo"])
def test_a_reward_sees_the_same_shape(engine: str, is_chat: bool, tmp_path: Path) -> None:
    rows = make_prompts(8)
    prompts: list[Any] = rows["prompt"][:]
    if is_chat:
        prompts = [[{"role": "user", "content": text}] for text in prompts]
    rows = Dataset.from_list(
        [
            {"prompt": p, "input_ids": ids, "subject": f"s{i}"}
            for i, (p, ids) in enumerate(zip(prompts, rows["input_ids"], strict=True))
        ]
    )
    reward = Recorder()
    train(engine, rows, reward, tmp_path)
    call = reward.calls[0]
    assert len(call["prompts"]) == len(call["completions"]) == len(call["completion_ids"]) == len(call["subject"])
    assert all(prompt in prompts for prompt in call["prompts"])
    assert all(subject == f"s{prompts.index(p)}" for p, subject in zip(call["prompts"], call["subject"], strict=True))
    assert all(isinstance(token, int) for ids in call["completion_ids"] for token in ids)
    if is_chat:
        assert all([m["role"] for m in answer] == ["assistant"] for answer in call["completions"])
        assert all(isinstance(answer[0]["content"], str) for answer in call["completions"])
    else:
        assert all(isinstance(answer, str) for answer in call["completions"])
