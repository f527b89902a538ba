"""What each of two processes does in ``ppo/test_processes.py``; not a test.

Run as ``ppo_worker.py OUTPUT {ours,stock} DONE...``: for each name in DONE the function of that name below, whose
result goes to ``OUTPUT/NAME-RANK.pt``. The same functions run in the test's own process, alone.
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig
from ppo_parts import losses, make_models, make_ours, make_prompts, make_stock, share_of_liked

import deepseek_training.ppo.player as ppo_player
from deepseek_training.ppo.forward import NO_TOKEN, response_logprobs
from deepseek_training.ppo.trainer import RewardError

MAKERS = {"ours": make_ours, "stock": make_stock}


def settings_for(num_processes):
    """8 prompts per update, whoever plays them; completions end early, so that no two halves have the same tokens."""
    return dict(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4 // num_processes,
        total_episodes=8 * 4,
        train=make_prompts(24),
        logging_steps=1,
    )


class Counting:
    """A reward with a state of its own in each process."""

    __name__ = "counting"

    def __init__(self, start):
        self.calls = start

    def __call__(self, prompts, completions, completion_ids, **kwargs):
        self.calls += not kwargs["is_evaluation"]
        return [score + self.calls / 100 for score in share_of_liked(prompts, completions, completion_ids)]

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def result(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "engine": trainer.accelerator.distributed_type.value,
        "num_processes": trainer.accelerator.num_processes,
        "weights": {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        "rows": losses(trainer),
    }


def train(make, folder, num_processes):
    """Train with checkpoints, and save the policy: what the stock class cannot."""
    trainer = make(folder / "train", save_strategy="steps", save_steps=2, **settings_for(num_processes))
    trainer.train()
    trainer.save_model(str(folder / "train" / "policy"))
    return result(trainer)


def evaluate_and_resume(make, folder, num_processes):
    """Train with held-out prompts and a stateful reward; begin again from the checkpoint half way."""
    results = []
    for checkpoint in (None, folder / "resume" / "checkpoint-2"):
        trainer = make(
            folder / "resume",
            reward=Counting(100 * torch.distributed.get_rank() if torch.distributed.is_initialized() else 0),
            held_out=make_prompts(11, seed=7),
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            **settings_for(num_processes),
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        results.append({**result(trainer), "held_out": len(trainer.last_evaluation["reward"])})
    return results


def learn_lora(make, folder, num_processes):
    trainer = make(
        folder / "lora",
        models=(make_models()[0], None),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
        save_strategy="steps",
        save_steps=2,
        **settings_for(num_processes),
    )
    trainer.train()
    return result(trainer)


def fail_in_one(make, folder, num_processes):
    """The last process's reward raises in the third update."""

    def reward(prompts, completions, completion_ids, **kwargs):
        is_last = torch.distributed.get_rank() == num_processes - 1
        if is_last and kwargs["trainer_state"].global_step == 2:
            raise OSError("the scorer is gone")
        return share_of_liked(prompts, completions, completion_ids)

    trainer = make(folder / "fail", reward=reward, **settings_for(num_processes))
    try:
        trainer.train()
    except RewardError as error:
        return str(error)


def learn_from_given_rollouts(make, folder, num_processes):
    """Train on completions that depend on the prompt alone, so that one process and two see the same."""
    original, ppo_player.sample = ppo_player.sample, sample_by_prompt
    try:
        trainer = make(folder / "given", **settings_for(num_processes))
        trainer.train()
    finally:
        ppo_player.sample = original
    return result(trainer)


def sample_by_prompt(policy, queries, config, batch_size, stop_token_id):
    rows = []
    for query in queries:
        generator = torch.Generator().manual_seed(int(query[query != NO_TOKEN].sum()))
        length = int(torch.randint(1, 7, (), generator=generator))
        row = torch.randint(3, 12, (6,), generator=generator)
        rows.append(row.masked_fill(torch.arange(6) >= length, NO_TOKEN))
    query_responses = torch.cat([queries, torch.stack(rows)], 1)
    return query_responses, response_logprobs(policy, query_responses, queries.shape[1], config.temperature - 1e-7)


if __name__ == "__main__":
    output, kind, *names = sys.argv[1:]
    torch.set_num_threads(1)
    for name in names:
        done = globals()[name](MAKERS[kind], Path(output), 2)
        torch.save(done, f"{output}/{name}-{torch.distributed.get_rank()}.pt")
