"""Language models and encoders of several families joined, and what cannot be joined."""

import json

import numpy as np
import pytest
import torch
from multimodal_model import STOCK, TINY_AUDIO, TINY_VISION, joined_model, text_model
from PIL import Image
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from deepseek_training.see_and_hear.encoders import load_audio, load_vision
from deepseek_training.see_and_hear.join import join
from modeling_deepseek.families import find_moe_layers

pytestmark = pytest.mark.xdist_group("multimodal")
SOUND = np.sin(np.arange(4000) / 10).astype(np.float32)
IMAGE = Image.new("RGB", (17, 5), "green")


def save_audio(kind, path):
    """A tiny audio backbone of a family, with what prepares its input."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "ast":
        model = ASTModel(ASTConfig(**sizes, max_length=98, num_mel_bins=16))
        extractor = ASTFeatureExtractor(max_length=98, num_mel_bins=16)
    elif kind == "wav2vec2":
        model = Wav2Vec2Model(Wav2Vec2Config(**sizes, conv_dim=(8,) * 7, num_conv_pos_embeddings=4))
        extractor = Wav2Vec2FeatureExtractor(feature_size=1, sampling_rate=16000)
    else:
        sides = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        config = WhisperConfig(d_model=16, vocab_size=60, max_source_positions=50, num_mel_bins=16, **sides, **tokens)
        model = WhisperModel(config)
        extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    model.save_pretrained(path)
    extractor.save_pretrained(path)


@pytest.mark.parametrize("family", ["deepseek_moe", "mixtral", "qwen3_moe", "deepseek_v3", "llama"])
def test_any_family_reads_as_it_did_and_balances(family, tmp_path):
    joined = joined_model(family)
    model, processor = joined.model, joined.processor
    assert len(find_moe_layers(model)) == len(find_moe_layers(text_model(family)[0]))
    inputs = processor(text="<image><audio>a", images=[IMAGE], audio=[SOUND], return_tensors="pt")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    read = AutoProcessor.from_pretrained(tmp_path)(
        text="<image><audio>a", images=[IMAGE], audio=[SOUND], return_tensors="pt"
    )
    assert read.keys() == inputs.keys() and all(torch.equal(read[name], inputs[name]) for name in inputs)


def test_tied_embeddings_stay_tied(tmp_path):
    model = joined_model("qwen3_moe", tie_word_embeddings=True).model
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight


@pytest.mark.parametrize("kind", ["ast", "wav2vec2", "whisper"])
def test_audio_backbones_by_path(kind, tmp_path):
    save_audio(kind, tmp_path)
    model, tokenizer = text_model()
    joined = join(model, tokenizer, audio=load_audio(str(tmp_path), {}), audio_seconds=1.0)
    inputs = joined.processor(text="<audio>a", audio=[SOUND], return_tensors="pt")
    assert (inputs["input_ids"] == joined.model.config.audio_token_id).sum() == joined.processor.audio_seq_length
    assert torch.isfinite(joined.model(**inputs).logits).all()


@pytest.mark.parametrize("seconds", [0.5, 1.0, 2.5])
def test_a_small_encoder_hears_a_sound_to_its_end(seconds):
    """At 16 kHz, the rate at which transformers' two ways to compute its features agree."""
    encoder = load_audio("small", TINY_AUDIO, seconds)
    assert encoder.processor.sampling_rate == 16_000
    sound = np.zeros(round(16_000 * seconds), dtype=np.float32)
    heard = [encoder.processor([sound], sampling_rate=16_000, return_tensors="np")["input_values"]]
    for start in np.linspace(0, seconds - 0.1, 7):
        place = round(start * 16_000)
        beep = sound.copy()
        beep[place : place + 1600] = np.sin(np.arange(1600))
        heard.append(encoder.processor([beep], sampling_rate=16_000, return_tensors="np")["input_values"])
    assert all(np.abs(one - heard[0]).max() > 1 for one in heard[1:])
    assert abs(heard[1].shape[1] - 100 * seconds) < 3  # frames of 10 ms, none of them filled up


def test_a_sound_that_an_encoder_would_cut_is_refused(tmp_path):
    """Of an AST for a second of sound, two seconds would lose their second half without a word."""
    save_audio("ast", tmp_path)
    model, tokenizer = text_model()
    with pytest.raises(
        ValueError, match="audio_seconds: got 2, expected less; what audio_encoder is given ends before"
    ):
        join(model, tokenizer, audio=load_audio(str(tmp_path), {}), audio_seconds=2.0)


def test_the_half_of_clip_that_sees_is_taken_with_its_weights(tmp_path):
    config = CLIPConfig(
        text_config={**TINY_VISION, "vocab_size": 50, "projection_dim": 8},
        vision_config={**TINY_VISION, "image_size": 16, "patch_size": 8, "projection_dim": 8},
    )
    clip = CLIPModel(config)
    clip.save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    encoder = load_vision(str(tmp_path), {})
    found, given = encoder.model.state_dict(), clip.vision_model.state_dict()
    for name, value in given.items():
        assert torch.equal(found[next(key for key in found if key.endswith(name))], value)
    model, tokenizer = text_model()
    joined = join(model, tokenizer, vision=encoder, vision_layer=-1, vision_strategy="default")
    assert joined.processor.image_seq_length == 4  # without the class token
    inputs = joined.processor(text="<image>a", images=[IMAGE], return_tensors="pt")
    assert torch.isfinite(joined.model(**inputs).logits).all()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere/at/all", "vision_encoder: 'nowhere/at/all' does not exist"),
        ("no-one/no-such-encoder", "vision_encoder: no-one/no-such-encoder is not a local folder and could not be"),
    ],
)
def test_an_encoder_that_does_not_exist_is_told(name, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        load_vision(name, {})


def test_a_text_model_is_no_encoder(tmp_path):
    model, tokenizer = text_model("llama")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"vision_encoder: .* cannot be loaded"):
        load_vision(str(tmp_path), {})


def test_settings_of_a_small_encoder_are_checked():
    with pytest.raises(ValueError, match="vision: got the unknown setting 'depth'"):
        load_vision("small", {"depth": 3})


def test_a_family_that_scales_its_logits_is_refused():
    sizes = {name: value for name, value in STOCK.items() if name != "head_dim"}
    model, tokenizer = text_model("granitemoe", **sizes, num_local_experts=4, logits_scaling=8.0)
    with pytest.raises(ValueError, match=r"model: got GraniteMoeForCausalLM, expected a family whose logits"):
        join(model, tokenizer, vision=load_vision("small", TINY_VISION))


def test_a_damaged_processor_is_told_in_one_line(tmp_path):
    from deepseek_records.loading import load_processor

    joined = joined_model(hears=False)
    joined.model.save_pretrained(tmp_path)
    joined.processor.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"a": 1})[:-2])
    with pytest.raises(ValueError, match=r"processor_config\.json"):
        load_processor(tmp_path)
