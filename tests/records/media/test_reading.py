"""Tables of questions, images of any mode, sounds of any rate: what is read, and what is refused in one line."""

import json

import numpy as np
import pytest
from PIL import Image

from deepseek_records.media.asking import encode_answer, encode_question
from deepseek_records.media.images import read_image
from deepseek_records.media.item import MediaItem
from deepseek_records.media.made_sets import SETS
from deepseek_records.media.reading import check_media, load_items
from deepseek_records.media.shuffled import with_media_of_others, without_media
from deepseek_records.media.sounds import read_sound

soundfile = pytest.importorskip("soundfile")


def write_table(folder, rows, name="metadata.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def test_a_table_and_its_folder_give_the_same_items(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "prompt": "Color?", "answer": " red ", "split": "train", "id": "one"},
        {"images": ["a.png", "a.png"], "prompt": "<image> or <image>?", "answer": "same", "split": "test"},
        {"file_name": "a.png", "prompt": "Color?", "answer": "red", "split": "train", "group": "color"},
        {"prompt": "No picture?", "answer": "none", "split": "train"},
    ]
    path = write_table(tmp_path, rows)
    for source in (path, tmp_path, str(tmp_path)):
        train, held_out = (load_items(source, split) for split in ("train", "validation"))
        assert [item.answer for item in train] == ["red", "red", "none"] and len(held_out) == 1
        assert [item.text for item in train] == ["<image>\nColor?", "<image>\nColor?", "No picture?"]
        assert train[0].id == "one" and train[1].group == "color" and len({item.id for item in train}) == 3
        check_media([*train, *held_out], None, None, has_eyes=True)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "a.png", "prompt": "", "answer": "x"}, r"line 1: prompt: got '', expected text"),
        ({"image": "a.png", "prompt": "a", "answer": "  "}, r"line 1: answer: got '  ', expected text"),
        ({"image": "a.png", "prompt": "a"}, r"line 1: answer: got no answer, expected text"),
        ({"image": 3, "prompt": "a", "answer": "b"}, r"line 1: image: got 3, expected a file"),
        (
            {"file_name": "a.txt", "prompt": "a", "answer": "b"},
            r"file_name: got 'a.txt', expected an image or",
        ),
        ({"image": "a.png", "prompt": "<image><image>", "answer": "b"}, r"got 2 <image> in the prompt, expected 1"),
        ({"images": ["a.png"] * 3, "prompt": "a <image>", "answer": "b"}, r"got 1 <image> in the prompt, expected 3"),
        (
            {"prompt": "<audio>", "answer": "b"},
            r"got 1 <audio> in the prompt, expected 0, as many as",
        ),
        ({"prompt": "a", "answer": "b", "split": 3}, r"split: got 3, expected text"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, row, said):
    with pytest.raises(ValueError, match=said):
        load_items(write_table(tmp_path, [row | {"split": row.get("split", "train")}]), "train")


def test_an_empty_split_and_a_missing_table_are_told(tmp_path):
    path = write_table(tmp_path, [{"prompt": "a", "answer": "b", "split": "train"}])
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="has no row of the split validation"):
        load_items(path, "validation")
    with pytest.raises(FileNotFoundError, match=r"holds none of metadata\.jsonl"):
        load_items(tmp_path / "nothing", "train")
    with pytest.raises(FileNotFoundError, match="did you mean shapes"):
        load_items("shape", "train")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F"])
def test_images_of_every_mode_and_of_one_pixel(tmp_path, mode):
    suffix = "tif" if mode in ("CMYK", "YCbCr", "LAB", "F", "I", "I;16") else "png"
    image = Image.new(mode, (1, 1))
    path = tmp_path / f"a.{suffix}"
    if mode == "HSV":
        found = read_image(image, "row")
    else:
        image.save(path)
        found = read_image(path, "row")
    assert found.mode == "RGB" and found.size == (1, 1)


def test_sixteen_bits_keep_their_shades_and_transparency_is_white(tmp_path):
    Image.fromarray(np.array([[0, 30000, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(read_image(tmp_path / "deep.png", "row"))[0, :, 0].tolist() == [0, 117, 255]
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(read_image(tmp_path / "clear.png", "row")).min() == 255
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "press.jpg", quality=95)
    red, green, blue = np.asarray(read_image(tmp_path / "press.jpg", "row"))[0, 0]
    assert red > 200 and green < 60 and blue < 60


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"0" * 20])
def test_a_damaged_image_is_named(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"row 7: .*a\.png cannot be read as an image"):
        read_image(tmp_path / "a.png", "row 7")


def test_a_truncated_image_and_a_missing_one_are_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:900])
    with pytest.raises(ValueError, match=r"cut\.jpg cannot be read as an image .*truncated"):
        read_image(tmp_path / "cut.jpg", "row")
    with pytest.raises(FileNotFoundError, match="row: no image"):
        read_image(tmp_path / "b.jpg", "row")


def test_sounds_are_resampled_and_their_channels_averaged(tmp_path):
    times = np.arange(44100) / 44100
    tone = np.sin(2 * np.pi * 440 * times)
    soundfile.write(tmp_path / "a.flac", np.stack([tone, 0 * tone], axis=1), 44100)
    found = read_sound(tmp_path / "a.flac", 8000, "row")
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    assert found.shape == (8000,) and found.dtype == np.float32
    assert np.abs(found - expected)[100:-100].max() < 0.01


@pytest.mark.parametrize(
    ("sound", "said"),
    [
        ({"array": [0.0] * 9, "sampling_rate": 0}, "got the sampling rate 0, expected 1000 to 400000"),
        ({"array": [0.0] * 9}, "got the sampling rate None"),
        ({"array": [float("nan")], "sampling_rate": 8000}, "got NaN or infinite samples"),
        ({"array": [], "sampling_rate": 8000}, r"got shape \(0,\), expected samples"),
        ({"array": np.zeros((2, 2, 2)), "sampling_rate": 8000}, r"got shape \(2, 2, 2\)"),
        (3.5, "got float, expected a file or an array"),
    ],
)
def test_a_wrong_sound_is_refused(sound, said):
    with pytest.raises(ValueError, match=said):
        read_sound(sound, 8000, "row")


def test_a_damaged_and_a_long_sound_are_named(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF0000WAVE")
    with pytest.raises(ValueError, match=r"row: .*a\.wav cannot be read as a sound"):
        read_sound(tmp_path / "a.wav", 8000, "row")
    soundfile.write(tmp_path / "b.wav", np.zeros(20000), 8000)
    item = MediaItem("b", "a", "b", sounds=(tmp_path / "b.wav",), where="row 2")
    with pytest.raises(ValueError, match=r"row 2: .*b\.wav: got 2\.50 s of sound, expected at most 1 s"):
        check_media([item], 8000, 1.0, has_eyes=False)
    with pytest.raises(ValueError, match="row 2: got sounds, expected none; the model has no encoder"):
        check_media([item], None, None, has_eyes=True)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_sound_that_ends_early_is_refused_and_not_read_as_a_shorter_one(suffix, tmp_path):
    sound = np.sin(np.arange(40_000) / 9) * np.linspace(0.1, 0.9, 40_000)
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    soundfile.write(whole, sound, 8000)
    assert len(read_sound(whole, 8000, "row")) == 40_000
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"row: .*cut\.{suffix} cannot be read as a sound"):
        read_sound(cut, 8000, "row")


def test_a_streams_header_that_knows_no_length_is_read(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(900), 8000)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    place = content.index(b"data") + 4
    content[place : place + 4] = (2**31 - 1).to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(content)
    assert len(read_sound(tmp_path / "a.wav", 8000, "row")) == 900


def test_a_file_of_no_format_is_not_called_absent(tmp_path):
    (tmp_path / "noise.mp3").write_bytes(np.random.default_rng(0).bytes(500))
    with pytest.raises(ValueError, match=r"noise\.mp3 cannot be read as a sound") as error:
        read_sound(tmp_path / "noise.mp3", 8000, "row")
    assert "exist" not in str(error.value)


@pytest.mark.parametrize("name", ["shapes", "tones"])
def test_the_made_sets_are_the_same_everywhere_and_hold_out_other_items(name):
    train, held_out = SETS[name]("train"), SETS[name]("validation")
    again = SETS[name].__wrapped__("validation")
    assert [item.to_row() for item in again] == [item.to_row() for item in held_out]
    seen = {tuple(item.to_row()[-1]) for item in train}
    assert len({item.id for item in (*train, *held_out)}) == len(train) + len(held_out)
    assert not seen & {tuple(item.to_row()[-1]) for item in held_out}


def test_digits_are_all_there_and_held_out_ones_are_others():
    pytest.importorskip("sklearn")
    train, held_out = SETS["digits"]("train"), SETS["digits"]("validation")
    assert (len(train), len(held_out)) == (1437, 360)
    assert not {item.id for item in train} & {item.id for item in held_out}


def test_the_controls_exchange_or_take_away_media():
    items = list(SETS["shapes"]("validation")[:40])
    others = with_media_of_others(items)
    assert all(a.images[0] is not b.images[0] for a, b in zip(items, others, strict=True))
    assert {id(a.images[0]) for a in items} == {id(b.images[0]) for b in others}
    assert [(a.prompt, a.answer) for a in items] == [(b.prompt, b.answer) for b in others]
    assert not any(item.images or "<image>" in item.text for item in without_media(items))


def test_users_text_that_spells_a_special_token_stays_text():
    from multimodal_model import joined_model

    processor = joined_model().processor
    end = processor.tokenizer.eos_token
    item = MediaItem("a", f"<image>{end} what?", f"it says {end}", images=(np.zeros((2, 2), dtype=np.uint8),))
    ids = encode_question(item, processor)
    assert ids.count(processor.image_token_id) == processor.image_seq_length
    assert processor.tokenizer.eos_token_id not in ids
    assert encode_answer(item, processor).count(processor.tokenizer.eos_token_id) == 1
