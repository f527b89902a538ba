"""The steps of `make demo-futures`: each is a command that parses; together they run on the demo's debug size."""

import pytest

from deepseek_cli import demo_futures
from deepseek_cli.main import _parse, build_parser, main
from deepseek_records.exit_codes import BAD_INPUT, DONE, MISSED
from deepseek_records.run_folder import RunFolder
from deepseek_records.summary import Summary


def test_each_step_parses_and_begins_from_the_demo(tmp_path):
    steps = demo_futures.list_steps(tmp_path / "demo", tmp_path / "futures", "build/edge/browser")
    parsed = [_parse(build_parser(), step.command) for step in steps]
    assert [one.command for one in parsed] == ["explain", "update", "export", "export", "multimodal", "evaluate"]
    assert parsed[0].model == parsed[2].model == str(tmp_path / "demo" / "align")
    assert {one.to for one in parsed[2:4]} == {"onnx", "browser"} and parsed[3].runtime == "build/edge/browser"
    assert len(demo_futures.list_steps(tmp_path, tmp_path, None)) == len(steps) - 1


def test_without_the_demo_it_says_so_in_one_line(tmp_path, capsys):
    words = ["--demo", str(tmp_path / "demo"), "--output", str(tmp_path / "run")]
    assert demo_futures.main(words) == BAD_INPUT
    told = f"--demo: got {tmp_path / 'demo'} without a finished adapt, expected one; run make demo\n"
    assert capsys.readouterr().err == f"demo-futures: error: {told}"
    assert demo_futures.main([*words, "--dry-run"]) == DONE
    assert "deepseek-moe update" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_a_run_is_copied_whole_and_once(tmp_path):
    run = RunFolder.create(tmp_path / "adapt", {}, command="adapt")
    (run.path / "checkpoints").mkdir()
    run.finish(Summary(stage="adapt"))
    demo_futures.copy_run(run.path, tmp_path / "learned")
    assert RunFolder(tmp_path / "learned").is_finished and not (tmp_path / "learned" / "checkpoints").exists()
    (tmp_path / "learned" / "mark").touch()
    demo_futures.copy_run(run.path, tmp_path / "learned")
    assert (tmp_path / "learned" / "mark").exists()


QUICK = {
    "explain": ["--passages", "3", "--length", "24", "--faithfulness", "1", "--experts", "1"],
    "update": ["--max-steps", "4", "--eval-bytes", "8000", "--alphas", "[0.5]", "--safety-prompts", "8"],
    "see and hear": [
        *("--max-steps", "6", "--frozen-steps", "2", "--warmup-steps", "1", "--logging-steps", "2"),
        *("--save-steps", "0", "--num-eval-items", "4", "--eval-bytes", "2000", "--batch-size", "4"),
    ],
    "ask what it saw": ["--limit", "3"],
}


@pytest.mark.slow
def test_the_steps_run_on_the_debug_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--size", "debug"]) in (DONE, MISSED)
    steps = demo_futures.list_steps(tmp_path / "runs/demo", tmp_path / "futures", None)
    for step in steps:
        step.command.extend(QUICK.get(step.name, []))
    monkeypatch.setattr(demo_futures, "list_steps", lambda *_: steps)
    words = ["--demo", str(tmp_path / "runs/demo"), "--output", str(tmp_path / "futures")]
    capsys.readouterr()
    assert demo_futures.main(words) == DONE, capsys.readouterr().err
    told = capsys.readouterr().out
    assert all(f"{step.name:<22}" in told for step in steps) and "s of processor time" in told
    assert all(step.leaves.exists() for step in steps)
    assert demo_futures.main(words) == DONE and capsys.readouterr().out.count("done before") == 2 * len(steps)
