"""The one way through every stage's command: recipe, stage, its lines, exit code."""

import argparse
import importlib
import re
import sys
import types
from pathlib import Path

import pytest

from deepseek_cli import adapt, stage_command
from deepseek_records.exit_codes import DONE, MISSED
from deepseek_records.summary import Check, Gain, Summary

COMMANDS = Path(stage_command.__file__).parent


def run_adapt(monkeypatch, summary, *words):
    """Run ``adapt`` with a stage that only returns a summary."""
    called = {}

    def stage(recipe, output, **options):
        called.update(recipe=recipe, output=output, **options)
        return summary

    monkeypatch.setitem(sys.modules, "deepseek_training.stages.adapt", types.SimpleNamespace(adapt=stage))
    parser = argparse.ArgumentParser(prog="deepseek-moe adapt")
    adapt.add_arguments(parser)
    args = parser.parse_args(["adapt-debug", "--model", "some/model", *words])
    args.subparser = parser
    return adapt.run(args), called


def checked(value):
    check = Check(name="change", value=value, comparison="<=", bound=0.0, passed=value <= 0, dataset="doses")
    return Summary(stage="adapt", checks=(check,), seconds=3.0)


@pytest.mark.parametrize(("value", "code", "word"), [(-0.1, DONE, "ok"), (0.1, MISSED, "missed")])
def test_a_missed_target_is_told_and_is_the_exit_code(monkeypatch, capsys, value, code, word):
    found, called = run_adapt(monkeypatch, checked(value), "--learning-rate", "0.5", "--output", "here")
    printed = capsys.readouterr()
    assert found == code and called["recipe"].learning_rate == 0.5 and called["output"] == "here"
    assert printed.out == f"doses: bits per byte {value:+.1%} ({word})\nmodel in here/model after 3 s\n"
    assert ("a target was missed: change" in printed.err) == (code == MISSED)


def test_a_dry_run_prints_nothing_more(monkeypatch, capsys):
    code, called = run_adapt(monkeypatch, None, "--dry-run")
    assert code == DONE and called["is_dry"] and capsys.readouterr().out == ""


def test_a_gain_without_an_error_is_told_without(capsys):
    gain = Gain(value=0.25, stderr_paired=None, stderr_unpaired=None, n=1)
    stage_command.print_gain(Summary(stage="align", gain=gain))
    assert capsys.readouterr().out == "held-out reward +0.2500 (n 1)\n"


def test_each_command_names_a_stage_that_is_there():
    named = {
        path.stem: re.findall(r'run_stage\(args, "(\w+)"', path.read_text(encoding="utf-8"))
        for path in COMMANDS.glob("*.py")
    }
    named = {command: names for command, names in named.items() if names}
    assert {"pretrain", "adapt", "sft", "align", "grpo", "dpo", "distill"} <= named.keys()
    for command, names in named.items():
        assert names == [command] and importlib.util.find_spec(f"deepseek_training.stages.{command}")
