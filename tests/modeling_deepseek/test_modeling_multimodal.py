"""The model that sees and hears: against stock LLaVA, rows alone against together, what a checkpoint needs."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from multimodal_model import joined_model, multimodal_path  # noqa: F401
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from modeling_deepseek import DeepseekMultimodalConfig, DeepseekMultimodalForConditionalGeneration
from modeling_deepseek.families import find_moe_layers

pytestmark = pytest.mark.xdist_group("multimodal")
RNG = np.random.default_rng(0)
IMAGES = [Image.fromarray(RNG.integers(0, 255, (9 + n, 12, 3), dtype=np.uint8)) for n in range(3)]
SOUNDS = [RNG.normal(0, 0.1, 500 + 900 * n).astype(np.float32) for n in range(2)]


@pytest.fixture(scope="module")
def loaded(multimodal_path):  # noqa: F811
    model = AutoModelForImageTextToText.from_pretrained(multimodal_path).eval()
    return model, AutoProcessor.from_pretrained(multimodal_path)


def test_with_eyes_alone_it_computes_what_stock_llava_does():
    joined = joined_model("mixtral", hears=False, num_local_experts=4)
    ours, config = joined.model, joined.model.config
    stock = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=config.text_config,
            vision_config=config.vision_config,
            image_token_index=config.image_token_id,
            image_seq_length=config.image_seq_length,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    ).eval()
    stock.load_state_dict(ours.state_dict())
    inputs = joined.processor(text="<image> a <image>", images=IMAGES[:2], return_tensors="pt")
    assert torch.equal(ours(**inputs).logits, stock(**inputs).logits)


def test_a_mixed_batch_equals_its_rows_alone(loaded):
    model, processor = loaded
    texts = ["<image>\nWhat is it?\n", "no picture, only text of some length\n", "<audio> then <image> and <image>\n"]
    images, sounds = [IMAGES[:1], None, IMAGES[1:]], [None, None, SOUNDS[:1]]
    together = processor(text=texts, images=IMAGES, audio=SOUNDS[:1], return_tensors="pt", padding=True)
    logits = model(**together).logits
    for row, text in enumerate(texts):
        alone = processor(text=text, images=images[row], audio=sounds[row], return_tensors="pt")
        own = logits[row][together["attention_mask"][row].bool()]
        torch.testing.assert_close(own, model(**alone).logits[0], atol=2e-5, rtol=1e-4)


def test_only_the_row_with_another_image_changes(loaded):
    model, processor = loaded
    texts = ["<image>a", "<image>a", "text"]
    first, second = (
        model(**processor(text=texts, images=images, return_tensors="pt", padding=True)).logits
        for images in (IMAGES[:2], [IMAGES[0], IMAGES[2]])
    )
    changed = (first - second).abs().amax((1, 2)) > 1e-6
    assert changed.tolist() == [False, True, False]


def test_decoding_with_a_cache_equals_decoding_without(loaded):
    model, processor = loaded
    inputs = processor(text="<image><audio>Say:", images=IMAGES[:1], audio=SOUNDS[:1], return_tensors="pt")
    outputs = [model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*outputs)
    written = set(outputs[0][0, inputs["input_ids"].shape[1] :].tolist())
    assert not written & {model.config.image_token_id, model.config.audio_token_id}


@pytest.mark.parametrize(
    ("text", "media", "said"),
    [
        ("<image>", {"images": IMAGES[:2]}, "should be the same as the number of images"),
        ("<image><image>", {"images": IMAGES[:1]}, "should be the same as the number of images"),
        ("<audio>", {"audio": [np.zeros(90_000, dtype=np.float32)]}, "1 to 16000 samples"),
        ("<audio>", {"audio": [np.zeros((40, 2), dtype=np.float32)]}, "one channel"),
    ],
)
def test_the_processor_refuses_what_does_not_match(loaded, text, media, said):
    with pytest.raises(ValueError, match=said):
        loaded[1](text=text, **media, return_tensors="pt")


def test_the_model_refuses_more_places_than_features(loaded):
    model, processor = loaded
    inputs = processor(text="<image>", images=IMAGES[:1], return_tensors="pt")
    ids = torch.cat([inputs["input_ids"], torch.full((1, 3), model.config.image_token_id)], dim=1)
    with pytest.raises(ValueError, match=r"pixel_values: got 1 of 16 tokens each, expected as many as the 19 places"):
        model(input_ids=ids, pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="no input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, model.config.text_config.hidden_size), **{"pixel_values": torch.ones(1)})


def test_gradients_reach_both_encoders_and_the_experts(loaded):
    model, processor = loaded
    inputs = processor(text="<image><audio>Say it.", images=IMAGES[:1], audio=SOUNDS[:1], return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= model.config.image_token_id, -100)
    model.train()(**inputs, labels=labels).loss.backward()
    parts = [model.model.vision_tower, model.model.audio_tower, model.model.multi_modal_projector]
    parts += [model.model.audio_projector, *(layer.experts for layer in find_moe_layers(model))]
    assert len(parts) > 4
    for part in parts:
        assert sum(float(p.grad.abs().sum()) for p in part.parameters() if p.grad is not None) > 0
    model.zero_grad(set_to_none=True)
    model.eval()


def test_a_config_without_encoder_and_an_unknown_part_are_told():
    with pytest.raises(ValueError, match="vision_config: got model_type 'no_such'"):
        DeepseekMultimodalConfig(vision_config={"model_type": "no_such"})
    with pytest.raises(ValueError, match="vision_feature_select_strategy"):
        DeepseekMultimodalConfig(vision_feature_select_strategy="cls")


CLEAN_PROCESS = """
import sys, torch, numpy as np
sys.modules.update(dict.fromkeys(
    ["modeling_deepseek", "deepseek_kernels", "deepseek_records", "deepseek_training", "deepseek_eval"]
))
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
path = sys.argv[1]
model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert type(processor).__module__.startswith("transformers_modules."), type(processor)
image, sound = Image.new("RGB", (20, 10), "red"), np.linspace(-1, 1, 3000, dtype=np.float32)
texts = ["<image>a", "<audio>b", "c"]
inputs = processor(text=texts, images=[image], audio=[sound], return_tensors="pt", padding=True)
torch.save((dict(inputs), model(**inputs).logits), path + "/logits.pt")
"""


@pytest.mark.slow
def test_loads_in_a_clean_process_by_remote_code_alone(multimodal_path, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    command = [sys.executable, "-c", CLEAN_PROCESS, str(multimodal_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    inputs, logits = torch.load(multimodal_path / "logits.pt")
    model = AutoModelForImageTextToText.from_pretrained(multimodal_path).eval()
    assert isinstance(model, DeepseekMultimodalForConditionalGeneration)
    torch.testing.assert_close(model(**inputs).logits, logits, atol=1e-5, rtol=1e-4)


def test_what_loads_without_our_code_is_stated(multimodal_path):  # noqa: F811
    """Of transformers' own classes none takes the configuration of a joined model."""
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForCausalLM.from_pretrained(multimodal_path)
