"""The table of runtimes, on a tiny model: every installed one gets a row, and in fp32 transformers' text."""

import importlib.util
import json
from pathlib import Path

import pytest

from deepseek_cli.main import main

MODEL = Path(__file__).resolve().parents[2] / "eval/reference/ours"


@pytest.mark.slow
def test_each_installed_runtime_has_its_row(tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="the extra `edge` is not installed")
    words = ["--prompts", "3", "--max-tokens", "6", "--rounds", "1", "--output", str(tmp_path / "bench")]
    assert main(["bench", "edge", str(MODEL), *words]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "bench" / "results.json").read_text())["rows"]
    names = [row["name"] for row in rows]
    assert names[:3] == ["transformers, fp32", "onnxruntime, fp32", "onnxruntime, int8"]
    for package, name in (("executorch", "ExecuTorch, fp32"), ("xllamacpp", "llama.cpp, fp32")):
        is_installed = importlib.util.find_spec(package) is not None
        assert any(one.startswith(name) for one in names) == is_installed, names
        assert is_installed or f"{name.split(',')[0]}: left out" in printed
    for row in rows:
        assert row["size_mb"] > 0 and row["tokens_per_second"] > 0 and row["load_s"] > 0
        assert row["num_equal"] == 3 or "int8" in row["name"], row
