import logging

import pytest

from deepseek_training.trainer.checkpoints import MARKER_FILE, is_complete, last_complete_checkpoint, mark_complete


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
