"""``deepseek-moe document`` on the runs of a real demo: exit codes, what is printed, and whose evaluation counts."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from deepseek_cli.main import main

REFERENCE = Path(__file__).resolve().parents[1] / "eval" / "reference"


@pytest.fixture
def demo(demo_folder, tmp_path, monkeypatch):
    """A copy that a test may write into, where its stages name one another by relative paths."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(demo_folder / "runs" / "demo", tmp_path / "runs" / "demo")


def read(out, name, key):
    fields = json.loads((out / f"{name}.json").read_text())["fields"]
    return next(field for field in fields if field["key"] == key)


@pytest.mark.xdist_group("demo")
def test_the_demo_is_documented_and_its_card_links_to_it(demo, capsys):
    out = demo / "documents"
    assert main(["document", str(demo), str(out), "--high-risk"]) == 0
    printed = capsys.readouterr().out
    assert "required fields are open; list them" in printed and "note:" not in printed
    results = read(out, "technical_documentation", "evaluation_results")
    assert results["status"] == "from files" and {"evaluate/summary.json"} <= {
        source["file"] for one in results["from_files"] for source in one["from"]
    }
    stages = {one["from"][0]["file"] for one in read(out, "technical_documentation", "training_design")["from_files"]}
    assert stages == {f"{stage}/recipe.yaml" for stage in ("pretrain", "adapt", "sft", "align")}
    size = read(out, "training_content_summary", "data_size")
    assert size["status"] == "from files" and size["from_files"][0]["text"].startswith("less than 1 billion tokens")
    assert main(["card", str(demo)]) == 0
    card = (demo / "README.md").read_text()
    assert "[Public summary of training content](documents/training_content_summary.md)" in card


@pytest.mark.xdist_group("demo")
@pytest.mark.parametrize("what", ["hash", "weights"])
def test_an_evaluation_of_other_weights_is_not_used(demo, what, tmp_path, capsys):
    if what == "hash":
        path = demo / "evaluate" / "inputs.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model": "0" * 64}))
    else:
        path = demo / "align" / "model" / "model.safetensors"
        tensors = load_file(path)
        tensors["model.norm.weight"] += 1
        save_file(tensors, path, metadata={"format": "pt"})
    assert main(["document", str(demo), str(tmp_path / "out")]) == 0
    assert "evaluate is not used: it measured other weights" in capsys.readouterr().out
    results = read(tmp_path / "out", "technical_documentation", "evaluation_results")
    assert "evaluate/summary.json" not in json.dumps(results)


@pytest.mark.xdist_group("demo")
def test_the_check_lists_what_is_missing_until_all_is_answered(demo, tmp_path, capsys):
    assert main(["document", str(demo / "pretrain"), "--check", "--json"]) == 3
    missing = json.loads(capsys.readouterr().out)
    assert missing["complete"] is False and {row["article"] for row in missing["missing"]} >= {
        *("Article 53(1)(a)", "Article 53(1)(d)", "Annex XI", "Annex XII"),
    }
    answers = tmp_path / "answers.yaml"
    assert main(["document", str(demo / "pretrain"), "--write-answers", str(answers)]) == 0
    values = yaml.safe_load(answers.read_text())
    kinds = {"public_data": True, "data_categories": {"books": "public"}}
    dates = ("document_date", "release_date", "union_release_date", "summary_date")
    asks = (
        "licensed_data",
        "private_data",
        "crawled_data",
        "user_data",
        "service_data",
        "synthetic_data",
        "other_data",
    )
    values = {key: "Told." for key in values} | kinds | dict.fromkeys(dates, "2099-01-01")
    values |= dict.fromkeys((*asks, "code_signatory", "systemic_risk"), False)
    answers.write_text(yaml.safe_dump(values))
    assert main(["document", str(demo / "pretrain"), "--check", "--answers", str(answers)]) == 0
    assert "0 required fields are missing" in capsys.readouterr().out
    values["total_size"] = "7 billion"
    answers.write_text(yaml.safe_dump(values))
    assert main(["document", str(demo / "pretrain"), "--check", "--answers", str(answers)]) == 3
    assert "contradicts: total_size: model/model.safetensors says" in capsys.readouterr().out
    assert main(["document", str(demo / "pretrain"), str(tmp_path / "out"), "--answers", str(answers)]) == 3
    assert "the answer to total_size contradicts a file" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("base", "options"), [("v3", []), ("llama", ["--bias-update-speed", "0"])])
def test_a_stock_model_s_adaptation_is_documented_from_there_on(base, options, tmp_path, capsys):
    """What came before it is not made up, and is no longer asked for once the provider names the model."""
    run, out = str(tmp_path / "adapt"), tmp_path / "out"
    assert main(["adapt", "adapt-debug", "--model", str(REFERENCE / base), "--output", run, *options]) in (0, 3)
    assert main(["document", run, str(out)]) == 0
    assert f"what {base} was made from and with, for its run is not here" in capsys.readouterr().out
    points = read(out, "technical_documentation", "data_points")
    assert points["status"] == "open in part" and "medicine" in points["from_files"][0]["text"]
    assert read(out, "technical_documentation", "model_dependencies")["from_files"][0]["text"] == f"made from {base}"
    (tmp_path / "answers.yaml").write_text("model_dependencies: somebody/base, version 1\n")
    assert main(["document", run, str(out), "--answers", str(tmp_path / "answers.yaml")]) == 0
    assert "documented from there on" in capsys.readouterr().out
    assert read(out, "technical_documentation", "data_points")["status"] == "from files"
    text = (out / "technical_documentation.md").read_text()
    assert str(REFERENCE) not in text and str(tmp_path) not in text
