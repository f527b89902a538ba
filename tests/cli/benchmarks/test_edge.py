"""The table of runtimes, on a tiny model: every installed one gets a row, and in fp32 transformers' text."""

import importlib.util
import json
from pathlib import Path

import pytest
from edge_models import FIXED, make_ours, make_tokenizer

from deepseek_cli.benchmarks import edge
from deepseek_cli.main import main
from deepseek_records.loading import load_model, load_tokenizer

MODEL = Path(__file__).resolve().parents[2] / "eval/reference/ours"  # with a prediction layer


@pytest.mark.slow
def test_each_installed_runtime_has_its_row(tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="the extra `edge` is not installed")
    make_ours(**FIXED).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    words = ["--prompts", "3", "--max-tokens", "6", "--rounds", "1", "--output", str(tmp_path / "bench")]
    assert main(["bench", "edge", str(tmp_path / "model"), *words]) == 0
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


def test_a_runtime_that_does_not_take_the_model_is_left_out(tmp_path, capsys, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setattr(edge.importlib.util, "find_spec", lambda _name: True)
    export = {"model": load_model(MODEL), "tokenizer": load_tokenizer(MODEL), "texts": []}
    assert not list(edge._llama_cpp(edge.Setting(tmp_path, [[1]], 1, 1), MODEL, export, [[1]], None))
    told = f"  llama.cpp: left out, model: {MODEL} is outside what llama.cpp computes: num_nextn_predict_layers=1\n"
    assert capsys.readouterr().out == told
