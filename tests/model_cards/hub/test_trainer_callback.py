import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from torch.utils.data import Dataset
from transformers import AutoTokenizer, Trainer, TrainingArguments

from deepseek_model_cards.hub.trainer_callback import HubCardCallback
from deepseek_records.summary import DataUse
from modeling_deepseek import DeepseekForCausalLM


class Tokens(Dataset):
    """Eight rows of twelve random tokens."""

    rows = torch.randint(0, 300, (8, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


@pytest.fixture
def pushed(hub, finished_stage, tmp_path, monkeypatch):
    """A real Trainer that trained two steps and pushed to the local Hub."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE  # made from the endpoint when the client was imported
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace(constants._HF_DEFAULT_ENDPOINT, hub.url)
    )
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # made once, with the endpoint of that time
    monkeypatch.setenv("SERVICE_PASSWORD", "swordfish-in-the-desert")
    model = DeepseekForCausalLM.from_pretrained(finished_stage / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished_stage / "model", trust_remote_code=True)
    args = TrainingArguments(
        *(str(tmp_path / "out"),),
        **{"max_steps": 2, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1e-3},
        **{"push_to_hub": True, "hub_model_id": "someone/fox", "hub_token": "hf_goodtoken", "hub_strategy": "end"},
        **{"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True},
    )
    trainer = Trainer(model, args, train_dataset=Tokens(), eval_dataset=Tokens(), processing_class=tokenizer)
    data = [DataUse(name="random tokens", license="mit", source="made here", split="train", num_rows=8)]
    trainer.add_callback(HubCardCallback(trainer, data=data, evaluated_on="random tokens", license="mit"))
    trainer.train()
    trainer.push_to_hub()
    return trainer


def test_a_trainers_own_push_brings_our_card_results_and_report(hub, pushed):
    there = hub.files("someone/fox")
    card = ModelCard(there["README.md"].decode())
    assert card.data.license == "mit" and "random tokens" in card.text
    assert f"{pushed.model.num_parameters():,}" in card.text  # counted in the folder that was pushed
    evaluated = [row["eval_loss"] for row in pushed.state.log_history if "eval_loss" in row]
    claimed = {row.metric_type: row.metric_value for row in card.data.eval_results}
    assert claimed["loss"] == pytest.approx(evaluated[-1])
    assert "report.html" not in there and there["block.png"].startswith(b"\x89PNG")
    assert (Path(pushed.args.output_dir) / "_run" / "report.html").is_file()  # it goes only when asked for
    assert "max_steps: 2" in card.text and "learning_rate: 0.001" in card.text


def test_what_the_trainer_would_leak_stays_at_home(hub, pushed, tmp_path):
    there = hub.files("someone/fox")
    assert "training_args.bin" not in there and not any(name.startswith("_run") for name in there)
    everything = b"".join(there.values())
    for secret in (b"hf_goodtoken", b"swordfish", str(tmp_path).encode()):
        assert secret not in everything
    # The check has power: the file that the callback removes does hold them.
    torch.save(pushed.args, tmp_path / "training_args.bin")
    assert all(s in (tmp_path / "training_args.bin").read_bytes() for s in (b"hf_goodtoken", str(tmp_path).encode()))


def test_the_run_folder_holds_what_was_logged(pushed, tmp_path):
    rows = [json.loads(line) for line in (tmp_path / "out" / "_run" / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in pushed.state.log_history if "loss" in row]
    assert [row["loss"] for row in rows if "loss" in row] == [row["loss"] for row in logged]


def test_a_card_edited_on_the_hub_outlives_a_trainers_push(hub, pushed):
    tree = hub.repositories["someone/fox"].branches["main"][-1][2]
    edited = tree["README.md"] = tree["README.md"].replace(b"# fox", b"# My fox")
    pushed.push_to_hub()
    assert hub.files("someone/fox")["README.md"] == edited and b"# My fox" in edited


def test_a_trainer_that_is_to_push_needs_a_license_before_it_trains(finished_stage, tmp_path):
    model = DeepseekForCausalLM.from_pretrained(finished_stage / "model")
    options = {"use_cpu": True, "report_to": [], "max_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    trainer = Trainer(model, TrainingArguments(str(tmp_path / "out"), **options), train_dataset=Tokens())
    callback = HubCardCallback(trainer)
    trainer.args.push_to_hub = True
    with pytest.raises(ValueError, match=r"license: got none, expected HubCardCallback\(license=\.\.\.\)"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)
