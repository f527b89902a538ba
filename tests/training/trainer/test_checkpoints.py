import logging

import pytest

from deepseek_training.trainer.checkpoints import (
    BEING_WRITTEN,
    MARKER_FILE,
    is_complete,
    last_complete_checkpoint,
    mark_complete,
    publish_checkpoint,
)


def make(folder, step):
    path = folder / f"checkpoint-{step}"
    (path / "sub").mkdir(parents=True)
    (path / "model.bin").write_bytes(b"x" * 100)
    (path / "sub" / "state.json").write_text("{}")
    mark_complete(path)
    return path


def test_the_highest_step_is_chosen_by_number(tmp_path):
    for step in (5, 20, 100):
        make(tmp_path, step)
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-100"
    assert last_complete_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("damage", ["no marker", "file missing", "file short", "marker short"])
def test_an_incomplete_one_is_never_chosen_and_is_named(tmp_path, damage, caplog):
    make(tmp_path, 5)
    newest = make(tmp_path, 10)
    if damage == "no marker":
        (newest / MARKER_FILE).unlink()
    elif damage == "file missing":
        (newest / "sub" / "state.json").unlink()
    elif damage == "file short":
        (newest / "model.bin").write_bytes(b"x" * 99)
    else:
        (newest / MARKER_FILE).write_text('{"model.bin": 10')
    assert not is_complete(newest)
    with caplog.at_level(logging.WARNING):
        assert last_complete_checkpoint(tmp_path).name == "checkpoint-5"
    assert "checkpoint-10 is incomplete" in caplog.text and not newest.exists()


def test_one_that_was_being_written_is_never_chosen(tmp_path, caplog):
    make(tmp_path, 5)
    make(tmp_path / BEING_WRITTEN, 10)  # whole in itself, but it was not renamed
    with caplog.at_level(logging.WARNING):
        assert last_complete_checkpoint(tmp_path).name == "checkpoint-5"
    assert "being_written/checkpoint-10 is incomplete" in caplog.text and not (tmp_path / BEING_WRITTEN).exists()


def test_a_written_one_is_marked_and_renamed_by_the_first_process(tmp_path):
    written = make(tmp_path / BEING_WRITTEN, 10)
    (written / MARKER_FILE).unlink()
    publish_checkpoint(written, is_first=False)
    assert last_complete_checkpoint(tmp_path / "elsewhere") is None and written.exists()
    publish_checkpoint(written, is_first=True)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
    assert is_complete(tmp_path / "checkpoint-10")
