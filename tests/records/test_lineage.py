"""Which stages of a folder made one model, and which evaluations measured that model."""

import shutil

import pytest

from deepseek_records.lineage import read_lineage
from deepseek_records.run_folder import RunFolder
from deepseek_records.summary import Result, Summary


def make(root, name, command, source=None, *, weights=b"1", **settings):
    """A finished run that left a model, unless it evaluates."""
    key = "model_name_or_path" if command == "evaluate" else "model"
    settings |= {key: str(source)} if source else {}
    run = RunFolder.create(root / name, settings, command=command, seed=0)
    row = Result(metric="acc", value=0.5, dataset=name)
    run.finish(Summary(stage=command, results=(row,)))
    if command != "evaluate":
        run.model_path.mkdir()
        (run.model_path / "config.json").write_text("{}")
        (run.model_path / "model.safetensors").write_bytes(weights)
    return run


def chain_of(root):
    lineage = read_lineage(root)
    return list(lineage.stages), lineage.final.name if lineage.final else None


def test_a_chain_is_found_whatever_its_folders_are_called(tmp_path):
    make(tmp_path, "c-first", "pretrain")
    make(tmp_path, "b-second", "sft", tmp_path / "c-first")
    make(tmp_path, "a-third", "sft", tmp_path / "b-second" / "model")
    make(tmp_path, "scores", "evaluate", tmp_path / "a-third" / "model")
    assert chain_of(tmp_path) == (["c-first", "b-second", "a-third", "scores"], "a-third")


def test_a_chain_survives_a_move_and_a_copy(tmp_path):
    root = tmp_path / "runs"
    make(root, "pretrain", "pretrain")
    make(root, "align", "align", root / "pretrain" / "model", weights=b"2")
    shutil.copytree(root, tmp_path / "copy")
    assert chain_of(tmp_path / "copy")[1] == "align"
    shutil.move(root, tmp_path / "elsewhere")
    assert chain_of(tmp_path / "elsewhere")[1] == "align"


def test_a_folder_of_the_same_name_with_other_weights_is_another_model(tmp_path):
    make(tmp_path / "theirs", "pretrain", "pretrain", weights=b"9")
    make(tmp_path / "ours", "pretrain", "pretrain", weights=b"1")
    make(tmp_path / "ours", "sft", "sft", tmp_path / "theirs" / "pretrain" / "model")
    with pytest.raises(ValueError, match="expected one model"):
        read_lineage(tmp_path / "ours")


@pytest.mark.parametrize(
    "runs",
    [
        [("a", "sft", "org/one"), ("b", "sft", "org/one"), ("c", "align", "org/two")],
        [("pretrain", "pretrain", None), ("mine", "align", "org/pretrain"), ("old", "pretrain", None)],
        [("seed0", "align", None), ("seed1", "align", None)],
        [("a", "evaluate", "org/one"), ("b", "evaluate", "org/two")],
    ],
)
def test_several_models_are_one_line(tmp_path, runs):
    for name, command, source in runs:
        make(tmp_path, name, command, source)
    with pytest.raises(
        ValueError, match=r"got \d runs in .* expected one model; pass one of them, for example"
    ) as error:
        read_lineage(tmp_path)
    assert "\n" not in str(error.value)
    for name, *_ in runs:
        assert read_lineage(tmp_path / name).stages


def test_scores_of_another_model_are_left_out_and_named(tmp_path):
    make(tmp_path, "sft", "sft", "org/one")
    make(tmp_path, "mine", "evaluate", tmp_path / "sft" / "model")
    make(tmp_path, "theirs", "evaluate", "org/one")
    make(tmp_path, "adapted", "evaluate", tmp_path / "sft" / "model", adapter="org/adapter")
    lineage = read_lineage(tmp_path)
    assert list(lineage.stages) == ["sft", "mine"] and lineage.base == "org/one"
    assert lineage.left_out == {"theirs": "org/one", "adapted": "org/adapter"}


def test_an_unfinished_stage_made_no_model(tmp_path):
    make(tmp_path, "pretrain", "pretrain")
    run = RunFolder.create(tmp_path / "align", {"model": "x"}, command="align", seed=0)
    run.model_path.mkdir()
    (run.model_path / "config.json").write_text("{}")
    assert chain_of(tmp_path) == (["pretrain", "align"], "pretrain")


def test_the_model_of_a_run_knows_its_making(tmp_path):
    make(tmp_path, "sft", "sft", "org/one")
    lineage = read_lineage(tmp_path / "sft" / "model")
    assert list(lineage.stages) == ["sft"] and lineage.base == "org/one"
    assert lineage.model_path == tmp_path / "sft" / "model"


def test_a_models_folder_without_a_run(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert read_lineage(tmp_path / "one").model_path == tmp_path / "one"
    with pytest.raises(ValueError, match="models one, two and no run, expected one model"):
        read_lineage(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"run: .*deeper"):
        read_lineage(tmp_path / "one" / "deeper")
