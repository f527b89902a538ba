"""What is written for Triton, and what the batched models compute: a text among others scores as it does alone."""

import json
from pathlib import Path

import pytest
import torch
from endpoint_server import make_model, make_tokenizer

from deepseek_cli.main import main
from deepseek_serving.triton_server.batched_compute import embeddings, head_scores, in_batches, log_likelihoods
from deepseek_serving.triton_server.repository import (
    KINDS,
    BatchingSettings,
    ServedModel,
    format_config,
    write_repository,
)
from modeling_deepseek import DeepseekForSequenceClassification

ROWS = [[5], [5, 6, 7], list(range(3, 60)), [9, 9], list(range(100, 140))]


@pytest.fixture(scope="module")
def model():
    return make_model("ours")


def test_a_score_is_the_sum_of_log_probabilities_whatever_the_batch(model):
    rows = [([], row) for row in ROWS] + [([5, 6], [7, 8, 9]), ([], [5, 6, 7, 8, 9])]
    scores, counts = log_likelihoods(model, rows, 10_000)
    assert counts.tolist() == [0, 2, 56, 1, 39, 3, 4]
    for place, (context, text) in enumerate(rows):
        ids = torch.tensor([context + text])
        with torch.inference_mode():
            logps = model(input_ids=ids).logits[0].log_softmax(-1)
        expected = [float(logps[n - 1, ids[0, n]]) for n in range(max(1, len(context)), ids.shape[1])]
        assert float(scores[place]) == pytest.approx(sum(expected), abs=1e-4)
    again, _ = log_likelihoods(model, rows, 64)  # in several passes
    assert torch.allclose(scores, again, atol=1e-4)
    # A text after a context and the rest of the same text put together are the whole.
    first, _ = log_likelihoods(model, [([], [5, 6])], 64)
    assert float(first[0] + scores[5]) == pytest.approx(float(scores[6]), abs=1e-4)


def test_embeddings_and_heads_see_no_padding(model):
    vectors = embeddings(model, ROWS, 10_000)
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(len(ROWS)))
    with torch.inference_mode():
        hidden = model.model(input_ids=torch.tensor([ROWS[1]])).last_hidden_state[0].mean(0)
    assert torch.allclose(vectors[1], hidden / hidden.norm(), atol=1e-5)
    torch.manual_seed(1)
    config = type(model.config)(**model.config.to_dict() | {"num_labels": 3})
    classifier = DeepseekForSequenceClassification(config).eval()
    together = head_scores(classifier, ROWS, 10_000)
    for place, row in enumerate(ROWS):
        with torch.inference_mode():
            alone = classifier(input_ids=torch.tensor([row])).logits[0]
        assert torch.allclose(together[place], alone, atol=1e-5)


def test_a_pass_holds_no_more_tokens_than_asked_for():
    batches = list(in_batches(ROWS, 60))
    assert sorted(place for batch in batches for place in batch) == list(range(len(ROWS)))
    assert all(len(batch) * max(len(ROWS[place]) for place in batch) <= 60 for batch in batches)


def test_the_configuration_says_what_was_asked_for():
    text = format_config("score", BatchingSettings(24, 2.5, 7, 10.0), is_gpu=True)
    for part in (
        'backend: "python"',
        "max_batch_size: 24",
        "kind: KIND_GPU count: 1",
        "preferred_batch_size: [ 4, 8, 16, 24 ]",
        "max_queue_delay_microseconds: 2500",
        "priority_levels: 2",
        "default_timeout_microseconds: 10000000",
        "max_queue_size: 7",
        'name: "context" data_type: TYPE_STRING dims: [ 1 ] optional: true',
    ):
        assert part in text
    alone = format_config("score", BatchingSettings(max_batch=1), is_gpu=False)
    assert "preferred" not in alone and "max_queue_delay_microseconds: 0" in alone and "KIND_CPU" in alone
    generation = format_config("generate", BatchingSettings(), is_gpu=False)
    assert "decoupled: true" in generation and "dynamic_batching" not in generation
    for kind in KINDS:
        told = format_config(kind, BatchingSettings(), is_gpu=False)
        assert told.count("{") == told.count("}") and told.count("[") == told.count("]")


def test_other_files_are_not_written_over(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="holds other files"):
        write_repository(tmp_path, [ServedModel("score", "m", 8, {})], BatchingSettings())


def test_the_command_writes_a_repository(tmp_path, capsys):
    make_model("ours").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    words = ["serve", str(tmp_path / "model"), "--engine", "triton", "--write", str(tmp_path / "repo")]
    for _ in range(2):  # over its own
        assert main([*words, "--max-tokens", "9"]) == 0
        assert "wrote embed, generate, safety, score" in capsys.readouterr().out
    settings = json.loads(Path(tmp_path, "repo/generate/1/settings.json").read_text())
    assert settings["checkpoint"] == str((tmp_path / "model").resolve())
    assert (settings["context"], settings["limits"]["max_tokens"]) == (256, 9)
    for kind in ("embed", "generate", "safety", "score"):
        source = (tmp_path / "repo" / kind / "1/model.py").read_text()
        compile(source, kind, "exec")
        assert str(tmp_path) not in source + (tmp_path / "repo" / kind / "config.pbtxt").read_text()
    assert main([*words, "--kinds", "score,reward"]) == 2
    assert "--kinds: got 'reward', expected some of score, embed, generate, safety" in capsys.readouterr().err


@pytest.mark.parametrize("max_batch", [1, 8])
def test_without_a_limit_nothing_keeps_triton_from_fetching_ahead(max_batch):
    """Any priority, time limit or bound does, and then its batcher sleeps through what comes while the model works."""
    text = format_config("score", BatchingSettings(max_batch, 5.0, None), is_gpu=False)
    assert "dynamic_batching" in text and text.count("{") == text.count("}")
    assert not any(part in text for part in ("priority", "queue_policy", "timeout", "max_queue_size"))
    assert ("preferred_batch_size: [ 4, 8 ]" in text) == (max_batch == 8)
