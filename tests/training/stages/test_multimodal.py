"""The multimodal stage: two stages in one training, what stands still, balancing, resuming, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from multimodal_model import TINY_AUDIO, TINY_VISION, multimodal_path, text_model  # noqa: F401
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from deepseek_cli.main import main
from deepseek_records.exit_codes import BAD_INPUT
from deepseek_records.run_files import find_foreign
from deepseek_records.run_folder import RunFolder
from deepseek_training.data.packing import PackedDataset
from deepseek_training.recipes.loading import load_recipe
from deepseek_training.recipes.multimodal import MultimodalRecipe
from deepseek_training.see_and_hear.lessons import Lessons, encode_items
from deepseek_training.stages.multimodal import multimodal
from deepseek_training.trainer.run_callbacks import ProgressBar

pytestmark = pytest.mark.xdist_group("multimodal")
COLORS = {"red": (220, 0, 0), "blue": (0, 0, 220)}


@pytest.fixture(scope="module")
def base_path(tmp_path_factory):
    """A debug-size text model of ours."""
    path = tmp_path_factory.mktemp("base")
    model, tokenizer = text_model()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Forty pictures of one color each, of odd sizes, with a table."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for number in range(40):
        color = ("red", "blue")[number % 2]
        Image.new("RGB", (3 + number, 7), COLORS[color]).save(folder / f"{number}.png")
        split = "train" if number < 32 else "test"
        rows.append({"image": f"{number}.png", "prompt": "Which color?", "answer": color, "split": split})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def make_recipe(base_path, pictures, tiny_data):
    def make(**settings):
        own = {"model": str(base_path), "data": [str(pictures)], "vision": TINY_VISION, "audio": TINY_AUDIO}
        small = {"sequence_length": 48, "max_steps": 6, "frozen_steps": 3, "logging_steps": 3, "save_steps": 3}
        more = {"audio_encoder": "none", "audio": {}, "replay_share": 0.5, "eval_bytes": 2000, "report_to": []}
        more["general_data"] = str(tiny_data)
        return load_recipe("multimodal-debug", MultimodalRecipe, {**own, **small, **more, **settings})

    return make


def weights_of(run):
    return AutoModelForImageTextToText.from_pretrained(RunFolder(run).model_path).state_dict()


def test_frozen_steps_leave_the_language_model_bit_for_bit(make_recipe, base_path, tmp_path):
    multimodal(make_recipe(frozen_steps=6, bias_update_speed=0.02), tmp_path / "run")
    before = AutoModelForCausalLM.from_pretrained(base_path).state_dict()
    after = weights_of(tmp_path / "run")
    for name, value in before.items():
        inner = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
        if inner in after:  # layers that predict further tokens are not taken along
            assert torch.equal(after[inner][: len(value)] if value.ndim else after[inner], value), name
    assert find_foreign(tmp_path / "run") is None  # --overwrite deletes only what a run writes
    rows = [row for row in RunFolder(tmp_path / "run").metrics if "loss" in row]
    assert all(row["load_imbalance"] >= 1 for row in rows)


@pytest.mark.slow
def test_it_learns_to_tell_colors_and_keeps_its_run_folder(make_recipe, tmp_path):
    recipe = make_recipe(max_steps=40, frozen_steps=10, learning_rate=5e-3, bias_update_speed=0.02, replay_share=0.25)
    summary = multimodal(recipe, tmp_path / "run")
    assert summary.stage == "multimodal" and summary.base_model == recipe.model
    answers = next(row for row in summary.results if row.dataset.endswith("(answers)"))
    assert answers.value < 0.7 * answers.baseline  # with the others' pictures
    assert summary.checks[-1].passed and {sample.completion[:2] for sample in summary.samples} == {"re", "bl"}
    run = RunFolder(tmp_path / "run")
    biases = [value for name, value in weights_of(run.path).items() if name.endswith("e_score_correction_bias")]
    assert biases and all(bias.abs().max() > 0 for bias in biases)
    rows = [row for row in run.metrics if "loss" in row]
    assert [row["step"] for row in rows] == list(range(3, 40, 3)) and sum(map(sum, rows[-1]["tokens_per_expert"])) > 0
    processor = AutoProcessor.from_pretrained(run.model_path)
    assert processor.image_seq_length == 16
    names = {row.name: row for row in summary.data}
    assert names[summary.results[-1].dataset.removesuffix(" (answers)")].license == "not stated"


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bits(make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe(max_steps=9, frozen_steps=4, bias_update_speed=0.02)
    whole = multimodal(recipe, tmp_path / "whole")

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            multimodal(recipe, tmp_path / "cut")
    resumed = multimodal(recipe, tmp_path / "cut")
    assert [row.value for row in resumed.results] == [row.value for row in whole.results]
    first, second = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_frozen_encoders_stay(make_recipe, tmp_path):
    recipe = make_recipe(train_encoders=False)
    multimodal(recipe, tmp_path / "run")
    torch.manual_seed(recipe.seed)
    from deepseek_training.see_and_hear.encoders import load_vision

    fresh = load_vision("small", recipe.vision).model.state_dict()
    after = weights_of(tmp_path / "run")
    found = {name: value for name, value in after.items() if name.startswith("model.vision_tower.")}
    assert len(found) == len(fresh)
    moved = [key for key in found if not torch.equal(found[key], fresh[key.removeprefix("model.vision_tower.")])]
    assert not moved


def test_a_dry_run_tells_and_writes_nothing(make_recipe, tmp_path, capsys):
    assert multimodal(make_recipe(), tmp_path / "run", is_dry=True) is None
    out = capsys.readouterr().out
    assert "32 to train on, 8 held out" in out and "questions, at most" in out and "nothing was written" in out
    assert not (tmp_path / "run").exists()


def test_lessons_alternate_in_whole_steps_and_ask_each_source_alike(make_recipe):
    class Items(list):
        """Examples stand in for themselves: only their numbers matter."""

    sources = [Items("abc"), Items(range(50))]
    texts = [PackedDataset([np.arange(28, dtype=np.int32)], 4)]
    lessons = Lessons(sources, texts, [1.0], num_steps=20, num_first=4, rows_per_step=6, replay_share=0.25, seed=0)
    assert lessons.is_text.sum() == 4 and not lessons.is_text[:4].any() and len(lessons) == 120
    steps = [lessons.order[start : start + 6] for start in range(0, 120, 6)]
    assert all(len({is_text for is_text, _ in step}) == 1 for step in steps)
    asked = [number for is_text, number in lessons.order if not is_text]
    assert sum(number < 3 for number in asked) == len(asked) // 2
    assert set(asked[1::2][:50]) == set(range(3, 53)) - set() or len(set(asked[1::2])) >= 46


def test_encoded_questions_are_what_the_processor_makes(base_path, tmp_path):
    from multimodal_model import joined_model

    from deepseek_records.media.item import MediaItem

    processor = joined_model(hears=False).processor
    item = MediaItem("a", "Which color?", "red", images=(np.zeros((4, 4, 3), dtype=np.uint8),))
    (example,) = encode_items([item], processor, 64)
    turns = [{"role": "user", "content": item.text}]
    text = processor.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    read = processor(text=text, images=[item.images[0]], return_tensors="pt")
    assert read["input_ids"][0].tolist() == example.input_ids[: example.num_given]
    with pytest.raises(ValueError, match=r"sequence_length: got 8, expected at least \d+, the tokens of a"):
        encode_items([item], processor, 8)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["--vision-encoder", "none"], "vision_encoder: got 'none', expected an encoder; audio_encoder is none too"),
        (["--frozen-steps", "99"], "frozen_steps: got 99, expected in 0 to max_steps=6"),
        (["--audio", "{num_mel_bins: 8}"], "audio: got {'num_mel_bins': 8}, expected nothing with audio_encoder=none"),
        (["--vision", "{depth: 8}"], "vision: got the unknown setting 'depth' of SiglipVisionConfig"),
        (["--vision-encoder", "no/such/thing"], "vision_encoder: 'no/such/thing' does not exist"),
        (["--data", "[shape]"], "did you mean shapes"),
        (["--data", "[tones]"], "got sounds, expected none; the model has no encoder for them"),
        (["--bias-update-speed", "-1"], "bias_update_speed: got -1"),
        (["--sequence-length", "8"], "sequence_length: got 8, expected at least"),
    ],
)
def test_wrong_calls_end_in_one_line(base_path, pictures, tmp_path, capsys, settings, said):
    words = [
        "multimodal",
        "multimodal-debug",
        "--model",
        str(base_path),
        "--data",
        f"[{pictures}]",
        "--max-steps",
        "6",
    ]
    words += ["--audio-encoder", "none", "--frozen-steps", "3", "--output", str(tmp_path / "run"), *settings]
    assert main(words) == BAD_INPUT
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1] and lines[-1].startswith("deepseek-moe multimodal: error: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["multimodal", "multimodal-debug"], ["adapt", "adapt-debug"], ["sft", "sft-debug"]])
def test_a_model_that_sees_is_not_trained_as_text(multimodal_path, tmp_path, capsys, words):  # noqa: F811
    assert main([*words, "--model", str(multimodal_path), "--output", str(tmp_path / "run")]) == BAD_INPUT
    assert "which sees or hears, expected a language model" in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_doctor_looks_at_a_model_that_sees(multimodal_path, capsys):  # noqa: F811
    assert main(["doctor", str(multimodal_path)]) == 0
    assert "7 passed" in capsys.readouterr().out


def test_a_damaged_picture_is_told_before_any_work(base_path, pictures, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes((pictures / "3.png").read_bytes()[:40])
    row = {"image": "bad.png", "prompt": "a", "answer": "b"}
    rows = [row | {"split": "train"}, row | {"split": "test", "image": str(pictures / "1.png")}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    words = ["multimodal", "multimodal-debug", "--model", str(base_path), "--data", f"[{tmp_path / 't.jsonl'}]"]
    assert main([*words, "--output", str(tmp_path / "run")]) == BAD_INPUT
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "t.jsonl, line 1: " in line and "bad.png cannot be read as an image" in line
