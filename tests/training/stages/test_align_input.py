"""What PPO refuses before it starts, and rewards that fail while it runs."""

import asyncio
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from ppo_parts import StockReward, make_models, make_ours, make_prompts, make_tokenizer, mended, share_of_liked

from deepseek_training.ppo.checkpoint import last_checkpoint
from deepseek_training.ppo.trainer import RewardError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"tokenizer": make_tokenizer(pad=None)}, "no pad token"),
        (lambda: {"train": make_prompts().select([])}, "train_dataset: it is empty"),
        (lambda: {"held_out": make_prompts().select([])}, "eval_dataset: it is empty"),
        (lambda: {"train": make_prompts().rename_column("input_ids", "ids")}, "no column 'input_ids'"),
        (lambda: {"train": [{"input_ids": [5]}] * 4}, "train_dataset: list is not supported"),
        (lambda: {"held_out": {"a": make_prompts()}}, "eval_dataset: dict is not supported"),
        (lambda: {"models": (make_models()[0], make_models(num_labels=2)[1])}, "it has 2 labels, expected 1"),
        (lambda: {"models": (make_models()[0], make_models()[0])}, "LlamaForCausalLM has no `score` head"),
        (lambda: {"models": (make_models()[0], make_models(vocab_size=20)[1])}, "it knows 20 tokens, the policy 29"),
        (lambda: {"train": rows([5], [], [6], [7])}, "train_dataset: prompt 1 has no tokens"),
        (lambda: {"train": rows([5], [6], [7], [8, 99])}, "prompt 3 has token 99, the model knows 0 to 28"),
        (lambda: {"train": rows([5], [6], [5] * 60, [7])}, "60 tokens, with response_length=6 more .* context of 64"),
        (lambda: {"held_out": rows([5] * 60)}, "eval_dataset: prompt 0 has 60 tokens"),
        (lambda: {"num_mini_batches": 2, "gradient_accumulation_steps": 3}, "num_mini_batches: got 2"),
        (lambda: {"num_mini_batches": 3}, "num_mini_batches: got 3, expected a divisor of 4 prompts"),
        (lambda: {"num_mini_batches": 0}, "num_mini_batches: got 0, expected 1 or more"),
        (lambda: {"response_length": 0}, "response_length: got 0, expected 1 or more"),
        (lambda: {"num_ppo_epochs": 0}, "num_ppo_epochs: got 0, expected 1 or more"),
        (lambda: {"kl_coef": -0.1}, "kl_coef: got -0.1, expected 0 or more"),
        (lambda: {"cliprange": float("nan")}, "cliprange: got nan, expected 0 or more"),
        (lambda: {"temperature": 0.0}, "temperature: got 0.0, expected above 0"),
        (lambda: {"lam": 1.5}, "lam: got 1.5, expected 0 to 1"),
        (lambda: {"kl_estimator": "k2"}, "kl_estimator: got 'k2', expected 'k1' or 'k3'"),
        (lambda: {"whiten_rewards": True}, "whiten_rewards: got True with a mini-batch of 4"),
    ],
)
def test_bad_input_is_one_line_before_training(change, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        make_ours(tmp_path / "run", **change())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()  # a run folder must not look begun


def rows(*ids):
    return Dataset.from_dict({"prompt": ["x"] * len(ids), "input_ids": list(ids)})


def test_the_reward_sees_prompts_columns_and_completions_alone(tmp_path):
    rows = make_prompts()
    rows = rows.add_column("topic", [f"topic {i}" for i in range(len(rows))])
    calls = []

    def reward(prompts, completions, completion_ids, topic, **kwargs):
        calls.append((prompts, completions, completion_ids, topic))
        kwargs["log_metric"]("seen", 3.0)
        return [0.5] * len(prompts)

    trainer = make_ours(tmp_path, reward=reward, train=rows, logging_steps=1)
    trainer.train()
    lookup = dict(zip(rows["prompt"], rows["topic"], strict=True))
    for prompts, completions, ids, topics in calls:
        assert len(prompts) == 4  # once per batch
        assert [lookup[prompt] for prompt in prompts] == topics
        decoded = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
        assert completions == decoded
        assert all(len(row) <= 6 for row in ids)
    assert trainer.state.log_history[0]["seen"] == 3.0


class Failing:
    """A reward with a state that moves before it fails, at its third call."""

    __name__ = "failing"

    def __init__(self, scores=None):
        self.scores, self.calls = scores, 0

    def __call__(self, prompts, completions, completion_ids, **kwargs):
        self.calls += 1
        if self.calls == 3 and self.scores is not None:
            return self.scores(len(prompts))
        return [score / self.calls for score in share_of_liked(prompts, completions, completion_ids)]

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda n: [0.5] * (n - 1), "got 3 scores, expected 4"),
        (lambda n: [float("nan")] * n, "expected a finite number"),
        (lambda n: [None] * n, "got no score for a completion"),
        (lambda n: None, "TypeError"),
        (lambda n: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_failing_reward_leaves_a_checkpoint_and_its_name(scores, message, tmp_path):
    trainer = make_ours(tmp_path, reward=Failing(scores), logging_steps=1)
    with pytest.raises(RewardError, match=f"step 3: .*{message}") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    whole = make_ours(tmp_path / "whole", reward=Failing())
    whole.train()
    resumed = make_ours(tmp_path, reward=Failing(), logging_steps=1)
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@mended(pytest.fail.Exception)
def test_a_reward_model_with_nan_scores_stops_the_run(make, tmp_path):
    class Broken(StockReward):
        def score(self, hidden_states):
            return hidden_states * float("nan")

    with pytest.raises(RewardError, match="step 1: the reward model's scores are not finite"):
        make(tmp_path, reward=Broken(), total_episodes=4).train()


def test_a_reward_failing_on_held_out_prompts_leaves_a_checkpoint_too(tmp_path):
    def reward(prompts, completions, completion_ids, **kwargs):
        if kwargs["is_evaluation"] and kwargs["trainer_state"].global_step == 2:
            raise OSError("gone\nfor good")
        return share_of_liked(prompts, completions, completion_ids)

    trainer = make_ours(tmp_path, reward=reward, held_out=make_prompts(5), eval_strategy="steps", eval_steps=1)
    with pytest.raises(RewardError, match="OSError: gone for good"):
        trainer.train()
    assert last_checkpoint(tmp_path).name == "checkpoint-2"


def test_evaluating_without_held_out_prompts_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="eval_dataset: none was given"):
        make_ours(tmp_path).evaluate()


TESTS = Path(__file__).parents[1]


def test_the_defect_tables_tests_exist():
    page = (Path(__file__).parents[3] / "docs" / "aligning_with_ppo.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_[a-z_]+)`", page))
    files = [*TESTS.glob("stages/test_align*.py"), *TESTS.glob("ppo/test_*.py")]
    files.append(TESTS.parent / "cli/benchmarks/test_attacks.py")
    sources = "".join(path.read_text(encoding="utf-8") for path in files)
    assert len(named) > 30 and named <= set(re.findall(r"def (test_\w+)\(", sources))
    twins = set(re.findall(r"`(test_[a-z_]+)` †", page))
    marked = re.findall(r"@(?:mended|pytest\.mark\.xfail)\(.*\)\n(?:@.*\n)*def (test_\w+)\(", sources)
    assert twins <= set(marked)


def test_a_reward_may_be_async(tmp_path):
    async def later(prompts, completions, completion_ids, **kwargs):
        await asyncio.sleep(0)
        return share_of_liked(prompts, completions, completion_ids)

    runs = [make_ours(tmp_path / reward.__name__, reward=reward) for reward in (share_of_liked, later)]
    for trainer in runs:
        trainer.train()
    for left, right in zip(*(trainer.model.parameters() for trainer in runs), strict=True):
        assert torch.equal(left, right)
