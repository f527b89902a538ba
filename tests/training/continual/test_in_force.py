"""The link to the model in force: one rename, roll back to what an update began from, and nothing else is followed."""

import os

import pytest
import yaml

from deepseek_training.continual import update_run
from deepseek_training.continual.in_force import current_model, point_to


@pytest.fixture
def run(tmp_path):
    """A finished run with two updates, of which the second began from the first's model."""
    path = tmp_path / "run"
    for folder, base in (("", None), ("updates/0001", "model"), ("updates/0002", "updates/0001/model")):
        (path / folder / "model").mkdir(parents=True)
        (path / folder / "model" / "config.json").write_text("{}")
        (path / folder / "summary.json").write_text("{}")
        (path / folder / "recipe.yaml").write_text(yaml.safe_dump({"model": base}))
    return path


def test_rolling_back_goes_the_way_of_the_updates(run):
    assert current_model(run) == run / "model"
    point_to(run, run / "updates/0002/model")
    assert os.readlink(run / "current") == "updates/0002/model"  # relative: the folder can be moved
    moved = run.rename(run.with_name("moved"))
    assert update_run.roll_back(moved) == moved / "updates/0001/model" == current_model(moved)
    assert update_run.roll_back(moved) == moved / "model" == current_model(moved)
    with pytest.raises(ValueError, match="its own model in force"):
        update_run.roll_back(moved)


def test_a_rename_that_never_came_leaves_the_old_model(run, monkeypatch):
    point_to(run, run / "updates/0001/model")

    def stop(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        point_to(run, run / "updates/0002/model")
    assert current_model(run) == run / "updates/0001/model"
    monkeypatch.undo()
    point_to(run, run / "updates/0002/model")  # over the link that was left
    assert current_model(run) == run / "updates/0002/model"


def test_other_links_are_refused(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    for target in (tmp_path / "elsewhere", "updates/0009/model"):
        (run / "current").unlink(missing_ok=True)
        (run / "current").symlink_to(target)
        with pytest.raises(ValueError, match="expected a model of this run"):
            current_model(run)
    (run / "current").unlink()
    (run / "current").mkdir()
    with pytest.raises(ValueError, match="which is not a link"):
        current_model(run)


def test_only_runs_with_a_model(run, tmp_path):
    assert update_run.check_run(run) == run
    with pytest.raises(ValueError, match="expected the run that it belongs to"):
        update_run.check_run(run / "updates" / "0001")
    with pytest.raises(ValueError, match="expected the run that it belongs to"):
        update_run.check_run(run / "current")
    with pytest.raises(FileNotFoundError, match="expected the folder of a finished run"):
        update_run.check_run(tmp_path)
    (run / "model" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="expected a run that left a model"):
        update_run.check_run(run)
    with pytest.raises(ValueError, match="without an update that was begun"):
        update_run.discard(run)
