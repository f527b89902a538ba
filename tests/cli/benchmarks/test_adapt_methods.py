"""``bench adapt``: every method on ours and on stock families, and the figures against plain counts."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from deepseek_cli.benchmarks.adapt_measures import MeasuredModel, held_out_sources
from deepseek_cli.benchmarks.adapt_methods import METHODS
from deepseek_cli.benchmarks.adapt_table import bits_change, hits_change
from deepseek_cli.main import main
from deepseek_records.run_folder import RunFolder
from deepseek_training.data.texts import load_texts
from deepseek_training.data.tokenizer import train_tokenizer
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
FEW = {"num_key_value_heads": 2, "num_experts_per_tok": 2, "vocab_size": 300}
FAMILIES = {
    "ours": lambda: DeepseekForCausalLM(DeepseekConfig.from_preset("debug", vocab_size=300)),
    "qwen3": lambda: AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(num_experts=4, moe_intermediate_size=8, **FEW, **SMALL)
    ),
    "mixtral": lambda: AutoModelForCausalLM.from_config(MixtralConfig(num_local_experts=4, **FEW, **SMALL)),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Short documents of three texts; the medicine's have two sources."""
    root = tmp_path_factory.mktemp("texts")
    for name in ("books", "medicine", "finance"):
        train = [text[:1500] for text in load_texts(name)[:30]]
        whole = load_texts(name, "validation")
        pieces = (text[place : place + 400] for text in whole for place in range(0, 8000, 400))
        held_out = [text for text in pieces if text.strip()][:60]
        rows = [{"text": text, "split": "train"} for text in train]
        rows += [{"text": text, "split": "validation", "source": "ab"[i % 2]} for i, text in enumerate(held_out)]
        if name != "medicine":
            rows = [{key: value for key, value in row.items() if key != "source"} for row in rows]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["text"].strip()))
    train_tokenizer(load_texts("medicine")[:20], 300).save_pretrained(root / "tokenizer")
    return root


def bench(texts, model, output, *more):
    words = ["bench", "adapt", str(model), "--domains", str(texts / "medicine.jsonl"), "--general"]
    words += [str(texts / "books.jsonl"), "--also", str(texts / "finance.jsonl"), "--steps", "4", "--eval-steps", "2"]
    words += ["--sequence-length", "64", "--eval-bytes", "6000", "--seeds", "1", "--rank", "2", "--top-p", "0.4"]
    return main([*words, "--replay-share", "0.1", "--output", str(output), *more])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_runs_and_is_told_apart(family, texts, tmp_path, capsys):
    torch.manual_seed(0)
    FAMILIES[family]().save_pretrained(tmp_path / "model")
    for path in (texts / "tokenizer").iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    tasks = ["--tasks", "pubmedqa,winobias" if family == "ours" else "", "--limit", "3", "--stop-loss", "10"]
    assert bench(texts, tmp_path / "model", tmp_path / "out", *tasks) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = results["domains"]["medicine"]
    assert tuple(rows) == METHODS
    sources = ["medicine: a", "medicine: b", "books", "finance"]
    trained = {name: row["num_trained"] for name, row in rows.items()}
    whole = trained["full"]
    assert trained["full, no replay"] == trained["full, no stop"] == whole and all(
        0 < one < whole for name, one in trained.items() if "full" not in name
    )
    seen = set()
    for row in rows.values():
        assert list(row["bits_per_byte"]) == sources and row["bits_per_byte"]["medicine: a"][0] != 0
        seen.add(json.dumps(row["bits_per_byte"]))
        assert row["kept_step"][0] == 4 and "words" in row["tail"]
    assert rows["full"]["bits_per_byte"] == rows["full, no stop"]["bits_per_byte"]  # nothing reaches this bound
    # Of a router that is not trained both scores may choose the same experts, and then train the same model.
    tokens, gate = (
        RunFolder(tmp_path / "out" / "runs" / f"medicine-ESFT-by-{name}-0").summary.details["chosen_experts"]
        for name in ("tokens", "gate")
    )
    assert len(seen) == len(METHODS) - (2 if tokens == gate else 1)
    for name in METHODS[3:]:  # routers and embeddings stay, whatever the family
        recipe = RunFolder(tmp_path / "out" / "runs" / f"medicine-{name.replace(' ', '-')}-0").settings
        assert recipe["bias_update_speed"] == 0.0
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in METHODS)
    assert {path.name for path in (tmp_path / "out" / "plots").iterdir()} == {"adapt.png", "long_tail_medicine.png"}
    if family == "ours":
        assert "pubmedqa" in results["before"]["acc"] and "winobias gap" in results["before"]["bias"]


@pytest.mark.slow
def test_an_interrupted_one_goes_on(texts, policy_of_bench, tmp_path, monkeypatch):
    more = ["--tasks", ""]
    from deepseek_cli.benchmarks import adapt_methods

    original, calls = adapt_methods.adapt, []

    def counted(recipe, folder):
        if len(calls) == 2:
            calls.append("stopped")
            raise KeyboardInterrupt
        calls.append(folder.name)
        return original(recipe, folder)

    monkeypatch.setattr(adapt_methods, "adapt", counted)
    methods = ["--methods", "full", "LoRA on experts", "ESFT by gate"]
    assert bench(texts, policy_of_bench, tmp_path / "out", *more, *methods) == 130
    assert bench(texts, policy_of_bench, tmp_path / "out", *more, *methods) == 0
    assert calls == ["medicine-full-0", "medicine-LoRA-on-experts-0", "stopped", "medicine-ESFT-by-gate-0"]
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["domains"]["medicine"]
    assert list(rows) == methods[1:]


@pytest.fixture(scope="module")
def policy_of_bench(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    FAMILIES["ours"]().save_pretrained(path)
    for one in (texts / "tokenizer").iterdir():
        (path / one.name).write_bytes(one.read_bytes())
    return path


def test_changes_are_plain_differences_with_both_errors():
    def model(bits, hits):
        return MeasuredModel({"x": bits}, {"x": [10.0, 30.0]}, {}, {}, {"t": dict(enumerate(hits))}, {})

    before = model([20.0, 60.0], [0, 1, 0, 1])
    seeds = [model([10.0, 50.0], [1, 1, 0, 1]), model([18.0, 42.0], [1, 1, 1, 1])]
    value, error = bits_change(before, seeds, "x")
    assert value == pytest.approx(-0.5)  # of -20 and -20 bits in 40 bytes
    # Means -6 and -14 bits in 10 and 30 bytes: residuals -1 and 1 of 40 bytes; the seeds' values are equal.
    assert error == pytest.approx(np.sqrt(2 * (1 + 1)) / 40)
    value, error = hits_change(before, seeds, "t")
    assert value == pytest.approx(3 / 8)
    items = [1.0, 0.0, 0.5, 0.0]
    assert error == pytest.approx(np.hypot(np.std(items, ddof=1) / 2, 0.125))


def test_the_embedded_medicine_has_two_sources():
    found = held_out_sources("medicine")
    assert list(found) == ["medicine: medquad", "medicine: pubmed_abstract"]
    assert sum(map(len, found.values())) == len(load_texts("medicine", "validation"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "full", "guess"], "methods: got 'guess', expected some of: full, no replay; full, no stop;"),
        (["--seeds", "0"], "seeds: got 0, expected at least 1"),
        (["--steps", "20", "--stop-patience", "2"], "stop_patience: got 2, expected at least 0 and below the 2 looks"),
        (["--general", "medicine"], "domains: got 'medicine' twice among the texts"),
        (["--domains", "medicine", "medicine"], "domains: got 'medicine' twice among the texts"),
    ],
)
def test_bad_options_are_one_line(policy_of_bench, tmp_path, capsys, more, message):
    assert main(["bench", "adapt", str(policy_of_bench), "--output", str(tmp_path / "out"), *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "out").exists()
