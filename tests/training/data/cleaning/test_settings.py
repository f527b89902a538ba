"""The settings that reach out of the text itself: limits fitted to trusted text, and tokens for training."""

import json
import random

import datasets
import pytest

pytest.importorskip("ftfy", reason="pip install 'deepseek-moe[data]'")

from deepseek_records.run_folder import RunFolder
from deepseek_training.data import token_cache
from deepseek_training.data.packing import encode_documents
from deepseek_training.data.texts import load_texts
from deepseek_training.data.tokenizer import train_tokenizer
from deepseek_training.recipes.data import DataRecipe
from deepseek_training.stages.clean_data import clean_data

CLEAN = [text[:900] for text in load_texts("medicine", "all")[:260]]
NOISE = [" ".join(random.Random(0).sample(text.split(), len(text.split()))) for text in CLEAN[200:260]]


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def noisy(tmp_path):
    """Half of it with its words shuffled."""
    return write_rows(tmp_path / "noisy.jsonl", [*CLEAN[:60], *NOISE])


def test_limits_are_fitted_to_trusted_text(noisy, tmp_path):
    trusted = write_rows(tmp_path / "clean.jsonl", CLEAN[60:200])

    def quality(source, **more):
        settings = {"filters": ["quality"], "num_samples": 200, **more}
        output = tmp_path / f"{source.stem}-{len(more)}"
        details = clean_data(DataRecipe(sources=[{"path": str(source)}], **settings), output, {}).details
        return details["limits"], details["filters"][-1]["num_dropped"]

    limits, dropped = quality(noisy, trusted=str(trusted))
    own, lost = quality(trusted, trusted=str(trusted))
    assert limits == own and set(limits) == {"en"} and limits["en"]["documents"] == 140  # whatever the source is
    assert dropped >= 45 and lost <= 0.01 * 140
    told = [json.loads(line) for line in (tmp_path / "noisy-1/dropped/quality.jsonl").read_text().splitlines()]
    assert sum(row["line"] > 60 for row in told) >= len(told) - 3 == dropped - 3  # hardly anything but the noise
    alone, _ = quality(noisy)
    assert set(alone) == {"noisy/en"} and alone["noisy/en"]["order_gain"] != limits["en"]["order_gain"]
    assert set(RunFolder(tmp_path / "noisy-1").inputs) == {"source noisy", "trusted", "benchmarks"}


def test_trusted_text_that_changed_is_refused(noisy, tmp_path, monkeypatch):
    trusted = write_rows(tmp_path / "clean.jsonl", CLEAN[60:120])
    recipe = DataRecipe(sources=[{"path": str(noisy)}], filters=["quality"], trusted=str(trusted))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        clean_data(recipe, tmp_path / "run", {})
    write_rows(trusted, CLEAN[61:120])
    with pytest.raises(FileExistsError, match="another content of trusted"):
        clean_data(recipe, tmp_path / "run", {})


@pytest.mark.parametrize(
    ("content", "settings", "told"),
    [
        ("", {}, "clean.jsonl is empty"),
        ('{"body": "x"}\n', {}, "has no column 'text'"),
        ('{"body": "x"}\n', {"trusted_column": "abstract"}, "has no column 'abstract'"),
    ],
)
def test_trusted_text_that_cannot_be_used(noisy, tmp_path, content, settings, told):
    path = tmp_path / "clean.jsonl"
    path.write_text(content)
    recipe = DataRecipe(sources=[{"path": str(noisy)}], filters=["quality"], trusted=str(path), **settings)
    with pytest.raises(ValueError, match=told) as error:
        clean_data(recipe, tmp_path / "run", {})
    assert "\n" not in str(error.value) and not RunFolder(tmp_path / "run").is_finished


@pytest.fixture
def tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(token_cache, "_LEAST_CHARACTERS", 10_000)
    tokenizer = train_tokenizer(CLEAN[:40], 300)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tokenizer


def recipe_with(tmp_path, **settings):
    path = tmp_path / "texts.jsonl"
    write_rows(path, CLEAN[:200])
    return DataRecipe(
        sources=[{"path": str(path)}], filters=["repair"], tokenizer=str(tmp_path / "tokenizer"), **settings
    )


def test_tokens_are_counted_and_training_finds_them(tmp_path, tokenizer, monkeypatch):
    summary = clean_data(recipe_with(tmp_path), tmp_path / "run", {})
    # The training split is long enough for the cache, and read from there.
    monkeypatch.setattr(token_cache, "encode_documents_plainly", lambda *_: pytest.fail("tokenized again"))
    train = encode_documents(load_texts(tmp_path / "run/data", "train"), tokenizer)
    assert summary.details["tokens"]["train"] == sum(map(len, train)) > 10_000
    assert set(summary.details["tokens"]) == {"train", "validation"}
    assert json.loads((tmp_path / "run/counts.json").read_text())["tokens"] == summary.details["tokens"]
    assert "tokenizer" in RunFolder(tmp_path / "run").inputs


def test_a_tokenizer_that_cannot_be_used_is_told_before_the_work(tmp_path, tokenizer):
    recipe = recipe_with(tmp_path)
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="without begin and end token") as error:
        clean_data(recipe, tmp_path / "run", {})
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{")
    with pytest.raises((ValueError, FileNotFoundError), match="tokenizer"):
        clean_data(recipe, tmp_path / "run", {})
    assert not (tmp_path / "run").exists()
