"""``deepseek-moe explain`` on a tiny checkpoint: what it writes, and that the page asks for nothing."""

import json
from pathlib import Path

import pytest

from deepseek_cli.main import main

MODEL = Path(__file__).resolve().parents[1] / "eval/reference/ours"


def test_it_writes_figures_and_a_page_of_one_file(tmp_path, capsys):
    pytest.importorskip("captum", reason="the extra `explain` is not installed")
    size = "--passages 3 --length 24 --faithfulness 2 --experts 2 --data medicine,dialogues"
    text = "<script>alert(1)</script> of the"
    assert main(["explain", str(MODEL), "--text", text, *size.split(), "--output", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "bits on domain" in printed and "deletion: better than random orders" in printed
    found = json.loads((tmp_path / "run/explain.json").read_text())
    assert found["atlas"]["domains"] == ["medicine", "dialogues"] and len(found["ablation"]) == 2
    assert [one["domain"] for one in found["sets"]] == [
        "medicine",
        "dialogues",
    ] and "random sets of equal load" in printed
    assert found["texts"][0]["attribution"]["error"] < 1e-3
    page = (tmp_path / "run/explain.html").read_text()
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org", "")
    assert "src=" in page and page.count("<table") > 5 and "&lt;" in page
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["stage"] == "explain" and summary["data"][0]["name"] == "medicine"
    again = f"{size} --mask 1:0 --overwrite --faithfulness 0 --set-size 0".split()
    assert main(["explain", str(MODEL), *again, "--output", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run/explain.json").read_text())
    assert [(one["layer"], one["expert"]) for one in found["ablation"]] == [("1", 0)] and not found["texts"]
    assert not found["sets"]


def test_without_captum_it_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(__import__("sys").modules, "captum.attr", None)
    assert main(["explain", str(MODEL), "--text", "of the", "--output", str(tmp_path / "run")]) == 2
    assert "pip install 'deepseek-moe[explain]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
