"""Interrupted PPO: checkpoints are whole or passed over, and a resumed run ends bit for bit like an unbroken one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ppo_parts import losses, make_models, make_ours, mended, share_of_liked
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from deepseek_training.ppo.checkpoint import last_checkpoint

CLOCKED = ("eps", "time/", "tokens_per_second")


def assert_same_run(mine, theirs):
    """Weights and every logged number that no clock is part of."""
    for left, right in zip(mine.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(left, right)
    for left, right in zip(losses(mine), losses(theirs), strict=True):
        for name, value in right.items():
            if not any(part in name for part in CLOCKED):
                assert left[name] == value, name


@mended(TypeError)
def test_resumes_exactly(make, tmp_path):
    settings = dict(total_episodes=16, save_strategy="steps", save_steps=2, logging_steps=1)
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    cut = make(tmp_path / "cut", **settings)
    cut.args.num_total_batches = 2
    cut.train()
    resumed = make(tmp_path / "cut", models=make_models(seed=9), **settings)
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path / "cut"))
    assert_same_run(resumed, whole)


@mended(OSError)
def test_checkpoint_holds_the_critic(make, tmp_path):
    trainer = make(tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    saved = LlamaForSequenceClassification.from_pretrained(tmp_path / "checkpoint-3" / "value_model")
    for mine, theirs in zip(saved.parameters(), trainer.value_model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    policy = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert torch.equal(policy.lm_head.weight, trainer.policy_model.lm_head.weight)


def test_checkpoints_hold_the_reference_once(tmp_path):
    trainer = make_ours(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2)
    trainer.train()
    files = [tmp_path / f"checkpoint-{step}" / "reference" / "model.safetensors" for step in (2, 3)]
    assert files[0].stat().st_ino == files[1].stat().st_ino
    saved = LlamaForCausalLM.from_pretrained(files[1].parent)
    start, _ = make_models()
    for mine, theirs, trained in zip(
        saved.parameters(), start.parameters(), trainer.policy_model.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs) and not torch.equal(mine, trained)


def test_a_checkpoint_cut_short_is_passed_over(tmp_path):
    trainer = make_ours(tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    for missing in ("complete.json", "optimizer.pt", "value_model/model.safetensors"):
        assert last_checkpoint(tmp_path).name == "checkpoint-3"
        path = tmp_path / "checkpoint-3" / missing
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert last_checkpoint(tmp_path).name == "checkpoint-2"
        with pytest.raises(FileNotFoundError, match="expected a whole PPO checkpoint"):
            trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-3")
        path.write_bytes(content)


def test_the_last_checkpoint_stays_until_the_next_is_whole(tmp_path, monkeypatch):
    trainer = make_ours(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1)
    left = []
    save = trainer.value_model.save_pretrained
    monkeypatch.setattr(
        trainer.value_model, "save_pretrained", lambda path: (left.append(last_checkpoint(tmp_path)), save(path))
    )
    trainer.train()
    assert [path and path.name for path in left] == [None, "checkpoint-1", "checkpoint-2"]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_true_takes_the_newest_checkpoint(tmp_path):
    settings = dict(save_strategy="steps", save_steps=1, logging_steps=1)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint=True: .* holds no whole checkpoint"):
        make_ours(tmp_path / "none").train(resume_from_checkpoint=True)
    whole = make_ours(tmp_path / "run", **settings)
    whole.train()
    (tmp_path / "run" / "checkpoint-3" / "complete.json").unlink()
    resumed = make_ours(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole)


def test_a_checkpoint_of_weights_alone_is_one_line(tmp_path):
    trainer = make_ours(tmp_path, save_strategy="steps", save_steps=3, save_only_model=True)
    trainer.train()
    with pytest.raises(ValueError, match="without optimizer state") as caught:
        trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-3")
    assert "\n" not in str(caught.value)


class Counting:
    """A reward with a state that its scores depend on."""

    __name__ = "counting"

    def __init__(self):
        self.calls = 0

    def __call__(self, prompts, completions, completion_ids, **kwargs):
        self.calls += not kwargs["is_evaluation"]
        return [score / self.calls for score in share_of_liked(prompts, completions, completion_ids)]

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def test_the_rewards_state_is_resumed(tmp_path):
    trainer = make_ours(tmp_path, reward=Counting(), save_strategy="steps", save_steps=3)
    trainer.train()
    assert json.loads((tmp_path / "checkpoint-3" / "ppo_state.json").read_text())["reward"] == [{"calls": 3}]
    reward = Counting()
    resumed = make_ours(tmp_path, reward=reward)
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-3")
    assert reward.calls == 3


# ---- SIGKILL --------------------------------------------------------------------------------------------------------

WORKER = """
import sys
from pathlib import Path
import torch
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
from ppo_parts import losses, make_ours
from test_resume import Counting, KILLED
from deepseek_training.ppo.checkpoint import last_checkpoint

torch.set_num_threads(1)
trainer = make_ours(sys.argv[2], reward=Counting(), **KILLED)
trainer.train(resume_from_checkpoint=last_checkpoint(sys.argv[2]))
torch.save({"weights": trainer.model.state_dict(), "rows": losses(trainer)}, sys.argv[2] + "/end.pt")
"""
KILLED = dict(
    total_episodes=4 * 40,
    save_strategy="steps",
    save_steps=2,
    save_total_limit=1,
    logging_steps=1,
    save_only_model=False,
)


def start(folder):
    folder.mkdir(exist_ok=True)
    (folder / "worker.py").write_text(WORKER)
    command = [sys.executable, str(folder / "worker.py"), str(Path(__file__).parent), str(folder)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)


def wait_for_half_a_checkpoint(folder, process, step):
    """True when a checkpoint at or after a step is being written: its folder is there, its list of files is not."""
    while process.poll() is None:
        for path in folder.glob("checkpoint-*"):
            if int(path.name.rpartition("-")[2]) >= step and not (path / "complete.json").exists():
                return True
        time.sleep(0.0005)
    return False


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_while_it_writes_a_checkpoint_it_ends_bit_for_bit_the_same(tmp_path):
    whole = start(tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read()[-3000:]
    broken, num_half_written = tmp_path / "broken", 0
    for step in (2, 10, 18, 26, 34):
        process = start(broken)
        if wait_for_half_a_checkpoint(broken, process, step):
            process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        halves = [path for path in broken.glob("checkpoint-*") if not (path / "complete.json").exists()]
        num_half_written += len(halves)
        last = last_checkpoint(broken)
        assert last not in halves
        assert step < 10 or last is not None  # the older one stayed
    assert num_half_written >= 3
    process = start(broken)
    assert process.wait() == 0, process.stderr.read()[-3000:]
    left, right = (torch.load(folder / "end.pt", weights_only=True) for folder in (tmp_path / "whole", broken))
    assert left["weights"].keys() == right["weights"].keys()
    assert all(torch.equal(left["weights"][name], right["weights"][name]) for name in left["weights"])
    for mine, theirs in zip(left["rows"], right["rows"], strict=True):
        assert all(mine[name] == theirs[name] for name in mine if not any(part in name for part in CLOCKED))
    assert len(left["rows"]) == 40
