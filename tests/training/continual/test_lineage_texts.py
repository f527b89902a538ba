"""What a model was trained on: through stages and updates, each source once, the first first."""

import pytest
import yaml

from deepseek_records.run_folder import RunFolder
from deepseek_records.summary import Summary
from deepseek_training.continual.in_force import point_to
from deepseek_training.continual.lineage_texts import taught_texts


def stage(path, command, **settings):
    run = RunFolder.create(path, settings, command=command, seed=0)
    run.model_path.mkdir()
    (run.model_path / "config.json").write_text("{}")
    run.finish(Summary(stage=command))
    return path


@pytest.fixture
def adapted(tmp_path):
    """Pretrained on a mixture, then adapted, then taught by two updates."""
    mixture = [{"path": "books", "weight": 1.0}, {"path": "medicine", "column": "text", "weight": 2.0}]
    first = stage(tmp_path / "first", "pretrain", data=mixture, encoding="utf-16", model={"hidden_size": 8})
    second = stage(
        tmp_path / "second",
        "adapt",
        data="finance",
        general_data="books",
        data_column=None,
        general_column="body",
        model=str(first / "model"),
    )
    stage(second / "updates/0001", "update", data="prose_zh", general_data=["dialogues"], model="model")
    stage(second / "updates/0002", "update", data="other", general_data=[], model="updates/0001/model")
    return second


def names(run, model):
    return [(one.source.path, one.source.column) for one in taught_texts(run, model)]


def test_every_source_once_and_the_first_first(adapted):
    base = [("books", None), ("medicine", "text"), ("finance", None)]
    assert names(adapted, adapted / "model") == base
    assert [one.encoding for one in taught_texts(adapted, adapted / "model")][:2] == ["utf-16", "utf-16"]
    one = [*base, ("prose_zh", None), ("dialogues", None)]
    assert names(adapted, adapted / "updates/0001/model") == one
    assert names(adapted, adapted / "updates/0002/model") == [*one, ("other", None)]


def test_a_run_that_began_from_an_updated_model(adapted, tmp_path):
    point_to(adapted, adapted / "updates/0001/model")
    third = stage(tmp_path / "third", "adapt", data="python", general_data="books", model=str(adapted / "current"))
    found = names(third, third / "model")
    assert ("prose_zh", None) in found and ("python", None) in found and ("other", None) not in found


def test_a_source_that_is_gone_is_named(adapted, caplog):
    (adapted / "updates/0002/recipe.yaml").write_text(
        yaml.safe_dump({"data": "gone/away.jsonl", "model": "updates/0001/model"})
    )
    texts = taught_texts(adapted, adapted / "updates/0002/model")
    with pytest.raises(FileNotFoundError, match=r"0002 was trained on gone/away.jsonl, which is not found"):
        texts[-1].load()


def test_conversations_are_told_of(adapted, tmp_path, caplog):
    chat = stage(tmp_path / "chat", "sft", data="dialogues", model=str(adapted / "model"))
    assert ("finance", None) in names(chat, chat / "model")
    assert "neither replayed nor held out" in caplog.text
