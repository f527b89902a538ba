import pytest

from deepseek_records.stages import merged_versions, read_stages
from deepseek_records.typed_json import to_json


def test_stages_of_a_parent_come_in_the_order_they_ran(finished_run):
    stages = read_stages(finished_run)
    assert list(stages) == ["pretrain", "adapt", "align", "evaluate"]


def test_one_stage_alone_is_named_by_its_summary(finished_run):
    stages = read_stages(finished_run / "adapt")
    assert list(stages) == ["adapt"]
    assert stages["adapt"].results[0].dataset == "medicine"


def test_a_series_holds_only_the_rows_that_logged_it(finished_run):
    steps, values = read_stages(finished_run)["pretrain"].series("eval_books_bits_per_byte")
    assert steps == [0, 50, 100, 150]
    assert values[0] == pytest.approx(6.1)


def test_an_unfinished_stage_is_kept_without_results(tmp_path, builders):
    builders["stage"](tmp_path, "align", settings={"a": 1}, summary=None)
    builders["stage"](tmp_path, "evaluate", settings={"a": 1}, summary={"seconds": 1})
    stages = read_stages(tmp_path)
    assert not stages["align"].is_finished and stages["align"].results == ()


def test_a_folder_without_a_finished_run_is_refused_in_one_line(tmp_path, builders):
    for path, words in ((tmp_path / "absent", "expected a run folder"), (tmp_path, "no finished run")):
        with pytest.raises(FileNotFoundError, match=words) as error:
            read_stages(path)
        assert "\n" not in str(error.value)
    builders["stage"](tmp_path, "pretrain", settings={}, summary=None)
    with pytest.raises(FileNotFoundError, match="no finished run"):
        read_stages(tmp_path)


def test_local_paths_and_tokens_are_gone_as_soon_as_a_run_is_read(tmp_path, builders):
    token = "hf_" + "Q" * 32
    settings = {"model": "/home/me/models/base", "hub_token": "anything", "note": f"pass {token}"}
    builders["stage"](tmp_path, "adapt", settings=settings, summary={"seconds": 1})
    stage = read_stages(tmp_path)["adapt"]
    assert stage.settings == {"model": "base", "hub_token": "[removed]", "note": "pass [removed]"}
    assert not any(word.startswith("/") for word in stage.environment.argv)


def test_versions_that_differ_between_stages_are_both_named(finished_run, tmp_path, builders):
    import json

    for name, version in (("pretrain", "1.0"), ("adapt", "2.0")):
        run = builders["stage"](tmp_path, name, settings={}, summary={"seconds": 1})
        environment = to_json(run.environment) | {"versions": {"torch": version, "python": "3.11"}}
        (run.path / "environment.json").write_text(json.dumps(environment))
    assert merged_versions(read_stages(tmp_path)) == {"torch": "1.0 / 2.0", "python": "3.11"}
