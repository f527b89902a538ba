"""Joins a language model with encoders: the model and its processor, ready to be trained or saved."""

import dataclasses
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepseek_training.see_and_hear.encoders import Encoder, count_tokens
from modeling_deepseek.configuration_multimodal import DeepseekMultimodalConfig
from modeling_deepseek.modeling_multimodal import DeepseekMultimodalForConditionalGeneration, MultimodalProjector
from modeling_deepseek.processing_multimodal import (
    AUDIO_TOKEN,
    IMAGE_TOKEN,
    AudioTextProcessor,
    ImageAudioTextProcessor,
    ImageTextProcessor,
    MultimodalProcessor,
)

_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Joined:
    """A model that sees, hears, or both, with its processor."""

    model: DeepseekMultimodalForConditionalGeneration
    processor: MultimodalProcessor


def join(
    causal: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vision: Encoder | None = None,
    audio: Encoder | None = None,
    audio_seconds: float = 1.0,
    vision_layer: int = -1,
    vision_strategy: str = "full",
    audio_layer: int = -1,
) -> Joined:
    """Return a model of a language model and encoders; the parts are its own from then on.

    The embedding grows by the tokens `<image>` and `<audio>`; no text gives them, and the model never writes them.
    Layers that predict further tokens are not taken along.

    Args:
        causal: A causal language model of any family whose logits are its head's of the last hidden states.
        tokenizer: Its tokenizer, which gets the new tokens.
        vision: The vision encoder; None for a model that does not see.
        audio: The audio encoder; None for a model that does not hear.
        audio_seconds: Length to which sounds are filled up.
        vision_layer: Which hidden states are taken.
        vision_strategy: ``full``, or ``default``: all but the first position.
        audio_layer: Which hidden states are taken.

    Raises:
        ValueError: There is no encoder, one cannot be used, or the language model computes its logits otherwise.
    """
    added = [token for token, part in ((IMAGE_TOKEN, vision), (AUDIO_TOKEN, audio)) if part is not None]
    if not added:
        raise ValueError("vision_encoder, audio_encoder: got none and none, expected at least one encoder")
    kept: dict[str, Any] = {}
    if vision is not None:
        number = count_tokens(vision, "vision_encoder", layer=vision_layer, audio_seconds=None)
        kept["image_seq_length"] = number - (vision_strategy == "default")
    if audio is not None:
        kept["audio_seq_length"] = count_tokens(audio, "audio_encoder", layer=audio_layer, audio_seconds=audio_seconds)
    probe = _probe(causal)
    expected = _logits(causal, probe)
    _grow(causal, tokenizer, added)
    config = DeepseekMultimodalConfig(
        text_config=causal.config,
        vision_config=None if vision is None else vision.config,
        audio_config=None if audio is None else audio.config,
        image_token_id=None if vision is None else tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        audio_token_id=None if audio is None else tokenizer.convert_tokens_to_ids(AUDIO_TOKEN),
        vision_feature_layer=vision_layer,
        vision_feature_select_strategy=vision_strategy,
        audio_feature_layer=audio_layer,
        **kept,
    )
    model = _assemble(config, causal, vision, audio)
    _check_same(model, causal, probe, expected)
    model.generation_config.suppress_tokens = tokenizer.convert_tokens_to_ids(added)
    return Joined(model, _make_processor(tokenizer, vision, audio, audio_seconds, kept))


def _grow(causal: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": tokens}, replace_extra_special_tokens=False)
    rows = causal.get_input_embeddings().weight.shape[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if len(tokenizer) > rows:  # else the embedding has rows to spare
            causal.resize_token_embeddings(len(tokenizer))


def _assemble(
    config: DeepseekMultimodalConfig, causal: PreTrainedModel, vision: Encoder | None, audio: Encoder | None
) -> DeepseekMultimodalForConditionalGeneration:
    """The whole, without a second copy of any part."""
    with torch.device("meta"):
        model = DeepseekMultimodalForConditionalGeneration(config)
    inner = model.model
    inner.language_model = causal.get_decoder()
    for part, tower, projector in (
        (vision, "vision_tower", "multi_modal_projector"),
        (audio, "audio_tower", "audio_projector"),
    ):
        if part is not None:
            setattr(inner, tower, part.model.to(causal.dtype))
            setattr(inner, projector, MultimodalProjector(part.config.hidden_size, config).to(causal.dtype))
    model.lm_head = causal.get_output_embeddings()
    if config.tie_word_embeddings:
        model.lm_head.weight = causal.get_input_embeddings().weight
    model.generation_config = causal.generation_config
    return model.to(causal.device).eval()


def _make_processor(
    tokenizer: PreTrainedTokenizerBase,
    vision: Encoder | None,
    audio: Encoder | None,
    audio_seconds: float,
    counts: dict[str, Any],
) -> MultimodalProcessor:
    parts: dict[str, Any] = {"tokenizer": tokenizer, **counts}
    if vision is not None:
        parts["image_processor"] = vision.processor
    if audio is not None:
        parts |= {"feature_extractor": audio.processor, "audio_seconds": audio_seconds}
    both = vision is not None and audio is not None
    kind = ImageAudioTextProcessor if both else ImageTextProcessor if audio is None else AudioTextProcessor
    return kind(**parts, chat_template=tokenizer.chat_template)


def _probe(causal: PreTrainedModel) -> torch.Tensor:
    size = causal.get_input_embeddings().weight.shape[0]
    return torch.arange(0, size, max(1, size // 16), device=causal.device)[:16].unsqueeze(0)


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids, use_cache=False).logits.float()


def _check_same(
    model: DeepseekMultimodalForConditionalGeneration,
    causal: PreTrainedModel,
    ids: torch.Tensor,
    expected: torch.Tensor,
) -> None:
    """Refuse a family that scales or bends its logits: the joined model would speak otherwise than it did."""
    if model.device.type == "meta":
        return
    found = _logits(model, ids)[..., : expected.shape[-1]]
    gap = float((found - expected).abs().max())
    if not gap <= _TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ValueError(
            f"model: got {type(causal).__name__}, expected a family whose logits are its head's of the last hidden "
            f"states; joined it would differ by {gap:.3g}"
        )
