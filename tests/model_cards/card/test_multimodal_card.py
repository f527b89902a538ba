"""The card of a model that sees or hears: its pipeline tag, its base model, and code that runs."""

import pytest
import yaml
from multimodal_model import joined_model
from printed_commands import run_all_that_it_prints

from deepseek_model_cards.card.card import write_card
from deepseek_records.run_folder import RunFolder
from deepseek_records.summary import Summary

pytestmark = pytest.mark.xdist_group("multimodal")


@pytest.mark.parametrize(
    ("parts", "tag"),
    [({"sees": True, "hears": True}, "image-text-to-text"), ({"sees": False}, "audio-text-to-text")],
    ids=["both", "hears"],
)
def test_the_card_names_the_task_and_the_base_and_prints_code_that_runs(parts, tag, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    run = RunFolder.create(tmp_path / "run", {"model": "someone/text-moe"}, command="multimodal")
    joined = joined_model(**parts)
    joined.model.save_pretrained(run.model_path)
    joined.processor.save_pretrained(run.model_path)
    run.finish(Summary(stage="multimodal", base_model="someone/text-moe"))
    readme = write_card(tmp_path / "run")
    metadata = yaml.safe_load(readme.read_text().split("---")[1])
    assert metadata["pipeline_tag"] == tag and metadata["base_model"] == ["someone/text-moe"]
    assert metadata["base_model_relation"] == "finetune" and metadata["library_name"] == "transformers"
    assert ("audio-text-to-text" in metadata["tags"]) == (len(parts) == 2)
    assert "mixture-of-experts" in metadata["tags"]
    assert len(run_all_that_it_prints(readme)) == 2  # with the package, and by remote code
