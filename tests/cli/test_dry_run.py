"""``--dry-run`` of what is no training: it tells what would happen, refuses what the run would, and writes nothing."""

import re
from pathlib import Path

import pytest

from deepseek_cli.bench import BENCHMARKS
from deepseek_cli.main import main

MODEL = str(Path(__file__).resolve().parents[1] / "eval/reference/ours")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "text.md"])


def test_evaluate(tmp_path, capsys):
    (tmp_path / "text.md").write_text("Some text. " * 40)
    words = ["evaluate", MODEL, "--tasks", "mmlu,humaneval,refusal,bits_per_byte", "--data", "bits_per_byte=text.md"]
    assert main([*words, "--limit", "mmlu=1,humaneval=3,refusal=1", "--max-new-tokens", "8", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"  mmlu +cais/mmlu: 57 of 14,042 items, [\d,]+ tokens to read, 0 shots", out)
    assert re.search(r"  humaneval +\S+: 3 of 164 items, .*at most 8 decoding steps", out)
    assert re.search(r"  bits_per_byte text.md: 1 items, [\d,]+ tokens to read", out)
    assert re.search(r"  model +[\d,]+ parameters, .* GiB of weights, on \w+; context 1,536 tokens", out)
    assert re.search(r"  time +about \d+ s to read, and at most \d+ s to write", out)
    assert out.endswith("dry run: nothing was written\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "humaneval", "--prompt-style", "chat"], "has no chat template; use base"),
        (["--tasks", "humaneval", "--max-new-tokens", "9999"], "leaves no room for a prompt"),
        (["--tasks", "bits_per_byte"], "data: got none for bits_per_byte"),
    ],
)
def test_evaluate_refuses_what_the_run_would(words, message, capsys):
    assert main(["evaluate", MODEL, *words, "--dry-run"]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_evaluate_has_none_where_no_model_is_run(capsys):
    assert main(["evaluate", "--compare", "a", "b", "--dry-run"]) == 2
    assert "--dry-run: without effect with --compare" in capsys.readouterr().err


def test_demo(capsys):
    assert main(["demo", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for stage in ("pretrain", "adapt", "sft", "align"):
        assert re.search(rf"  {stage} +would be run +{stage}-demo\n", out)
    assert "at most 8 minutes and 6 GiB on two idle CPU cores" in out


@pytest.mark.parametrize("name", [one.name for one in BENCHMARKS if one.name != "rewards"])
def test_bench(name, capsys):
    assert main(["bench", name, *([MODEL] if name in ("serving", "edge", "smaller") else []), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"bench {name}: ") and re.search(rf"  output +runs/bench-{name}\n", out)
    assert out.endswith("dry run: nothing was written\n")
