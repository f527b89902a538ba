"""Questions about images and sounds in the harness: controls, resuming, experts by kind of token, and refusals."""

import json

import numpy as np
import pytest
import torch
from multimodal_model import multimodal_path, text_model  # noqa: F401
from PIL import Image

from deepseek_cli.main import main
from deepseek_eval.answers.samples_writer import AnswerFile
from deepseek_eval.harness import evaluate_model
from deepseek_eval.interpret.media_routing import kinds_of, route_media
from deepseek_eval.metrics.loading import load_metric
from deepseek_eval.model_loading import load_model
from deepseek_eval.tasks.catalogue import TASKS
from deepseek_records.exit_codes import BAD_INPUT
from deepseek_records.media.item import MediaItem
from deepseek_records.run_files import find_foreign

pytestmark = pytest.mark.xdist_group("multimodal")


def test_the_metric_counts_by_hand():
    scores = load_metric("media_accuracy").compute(
        predictions=["Red.", "two", "two ", "four"],
        references=["red", "two", "three", "four"],
        blind=["red", "", "three", "one"],
        exchanged=["blue", "two", "one", "one"],
        groups=["color", "number", "number", "number"],
    )
    assert (scores["acc"], scores["acc_blind"], scores["acc_exchanged"], scores["n"]) == (0.75, 0.5, 0.25, 4)
    assert scores["acc_commonest"] == 0.5  # one color, and one of three numbers
    assert scores["gain_over_blind"] == 0.25 and scores["gain_over_exchanged"] == 0.5
    differences = np.array([0, 1, -1, 1])
    assert scores["gain_over_blind_stderr"] == pytest.approx(differences.std(ddof=1) / 2)
    assert [one["acc"] for one in scores["samples"]] == [1, 1, 0, 1]
    assert scores["groups"]["color"]["acc_stderr"] is None


def test_a_model_that_cannot_tell_scores_alike_and_a_stopped_run_goes_on(multimodal_path, tmp_path, monkeypatch):  # noqa: F811
    settings = {"tasks": ("shapes", "tones"), "limit": 6, "batch_size": 3, "max_new_tokens": 3}
    whole = evaluate_model(multimodal_path, output=tmp_path / "whole", **settings)
    taken = AnswerFile.append
    calls = []

    def stop(self, rows):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        taken(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate_model(multimodal_path, output=tmp_path / "cut", **settings)
    resumed = evaluate_model(multimodal_path, output=tmp_path / "cut", **settings)
    assert resumed["tasks"] == whole["tasks"]
    for task in ("shapes", "tones"):
        names = [(tmp_path / run / f"samples_{task}.jsonl").read_text() for run in ("whole", "cut")]
        assert names[0] == names[1]
    found = whole["tasks"]["shapes"]["experts"]
    assert found["kinds"] == ["text", "image"] and len(found["layers"][0]["rates"]) == 2
    pictures = sorted(path.name for path in (tmp_path / "whole" / "media" / "tones").iterdir())
    assert find_foreign(tmp_path / "whole") is None  # --overwrite deletes only what a run writes
    assert len(pictures) == 12 and pictures[0].endswith(".png") and pictures[1].endswith(".wav")


def test_experts_are_counted_by_kind_of_token(multimodal_path):  # noqa: F811
    loaded = load_model(multimodal_path)
    items = [MediaItem("a", "a b c", "x", images=(np.zeros((4, 4), dtype=np.uint8),)), MediaItem("b", "d", "x")]
    found = route_media(loaded, items, batch_size=2)
    assert found["kinds"] == ["text", "image"] and found["num_tokens"][1] == loaded.processor.image_seq_length
    least, most = (
        loaded.model.config.text_config.min_experts_per_tok,
        loaded.model.config.text_config.num_experts_per_tok,
    )
    for layer in found["layers"]:
        for rates in layer["rates"]:
            assert least - 1e-6 <= sum(rates) <= most + 1e-6
    ids = torch.tensor([[5, loaded.model.config.image_token_id, loaded.model.config.audio_token_id]])
    assert kinds_of(ids, loaded.model.config).tolist() == [[0, 1, 2]]


def test_own_pictures_are_asked_by_the_command_and_shown(multimodal_path, tmp_path, capsys):  # noqa: F811
    Image.new("CMYK", (9, 1)).save(tmp_path / "a.tif")
    rows = [{"id": f"r{n}", "image": "a.tif", "prompt": "What?", "answer": "x", "split": "test"} for n in range(3)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["evaluate", str(multimodal_path), "--tasks", "shapes", "--data", f"shapes={tmp_path}"]
    assert main([*words, "--max-new-tokens", "2", "--output", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "acc_blind" in out and "media.html" in out
    page = (tmp_path / "run" / "media.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "http" not in page and "What?" in page
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["tasks"]["shapes"]["n"] == 3
    (tmp_path / "a.tif").write_bytes(b"II*\x00")
    assert main([*words, "--output", str(tmp_path / "again")]) == BAD_INPUT
    assert "a.tif cannot be read as an image" in capsys.readouterr().err


def test_a_model_that_only_reads_is_refused(tmp_path, capsys):
    model, tokenizer = text_model()
    model.save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    words = [
        "evaluate",
        str(tmp_path / "text"),
        "--tasks",
        "shapes",
        "--limit",
        "2",
        "--output",
        str(tmp_path / "run"),
    ]
    assert main(words) == BAD_INPUT
    assert "got shapes for a model that only reads" in capsys.readouterr().err


def test_a_dry_run_counts_three_answers_per_question(multimodal_path, tmp_path, capsys):  # noqa: F811
    words = ["evaluate", str(multimodal_path), "--tasks", "tones", "--limit", "4", "--batch-size", "4", "--dry-run"]
    assert main([*words, "--output", str(tmp_path / "run")]) == 0
    assert "at most 24 decoding steps" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_text_tasks_take_a_model_that_sees(multimodal_path, tmp_path):  # noqa: F811
    (tmp_path / "a.txt").write_text("A fox sat on a wall and looked at a crow. " * 9)
    found = evaluate_model(
        multimodal_path, tasks=("bits_per_byte",), data_path=tmp_path / "a.txt", output=tmp_path / "run"
    )
    assert found["tasks"]["bits_per_byte"]["bits_per_byte"] > 0


def test_every_media_task_says_what_it_does_not_show():
    for task in TASKS.values():
        assert task.kind != "media" or (task.does_not_show and task.metric == "media_accuracy")
