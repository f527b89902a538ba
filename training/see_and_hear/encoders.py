"""Vision and audio encoders with what prepares their input: small new ones, or any of transformers by name."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from deepseek_records.loading import first_line, resolve_checkpoint
from deepseek_training.recipes.multimodal import SMALL
from modeling_deepseek.modeling_multimodal import build_encoder

# 16 tokens per image of 32 x 32, 48 + 2 per second of sound.
_SMALL_VISION = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_SMALL_AUDIO = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 8,
    "frequency_stride": 8,
    "time_stride": 8,
    "num_mel_bins": 32,
    # AST's 0.02 suits a width of 768; at 64 every layer would shrink its input to a sixth.
    "initializer_range": 0.1,
}
# AST's window and hop are 25 and 10 ms of this rate. At another one transformers counts them in samples, or where
# torchaudio is installed in milliseconds: the same sound would have other features, or only its first half.
_SMALL_RATE, _WINDOW, _HOP = 16_000, 400, 160
# Of the log mel energies of the made tones, so that the encoder's input has a mean of 0 and a deviation of about 1.
_SMALL_MEAN, _SMALL_STD = -7.2, 2.4
# Loudness and length in seconds of what is put at the end of silence to see whether it is heard.
_CLICK, _CLICK_SECONDS = 0.5, 0.03


@dataclasses.dataclass(frozen=True)
class Encoder:
    """An encoder with what prepares its input.

    Attributes:
        model: Gives hidden states `[M, T, D_v]`.
        config: What `modeling_deepseek.modeling_multimodal.build_encoder` builds it of.
        processor: An image processor or a feature extractor.
    """

    model: PreTrainedModel
    config: PreTrainedConfig
    processor: Any


def load_vision(name: str, settings: dict[str, Any]) -> Encoder:
    """Return a vision encoder.

    Args:
        name: ``small`` for a new SigLIP of two layers, or a folder or Hub id.
        settings: Of the small one's configuration, in place of its own.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It cannot be loaded, or a setting is unknown.
    """
    if name != SMALL:
        return _load(name, "vision_encoder", "vision_config", AutoImageProcessor)
    config = _configure(SiglipVisionConfig, {**_SMALL_VISION, **settings}, "vision")
    size = {"height": config.image_size, "width": config.image_size}
    return Encoder(build_encoder(config), config, SiglipImageProcessor(size=size))


def load_audio(name: str, settings: dict[str, Any], audio_seconds: float = 1.0) -> Encoder:
    """Return an audio encoder.

    Args:
        name: ``small`` for a new spectrogram transformer (AST) of two layers, or a folder or Hub id.
        settings: Of the small one's configuration, in place of its own.
        audio_seconds: Length of a sound, which the small one takes whole.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It cannot be loaded, or a setting is unknown.
    """
    if name != SMALL:
        return _load(name, "audio_encoder", "audio_config", AutoFeatureExtractor)
    num_frames = 1 + max(0, round(audio_seconds * _SMALL_RATE) - _WINDOW) // _HOP
    config = _configure(ASTConfig, {**_SMALL_AUDIO, "max_length": num_frames, **settings}, "audio")
    extractor = ASTFeatureExtractor(
        sampling_rate=_SMALL_RATE,
        num_mel_bins=config.num_mel_bins,
        max_length=config.max_length,
        mean=_SMALL_MEAN,
        std=_SMALL_STD,
    )
    model = build_encoder(config)
    # AST begins with positions of 0: a new one would not tell early from late for a long time.
    torch.nn.init.normal_(model.embeddings.position_embeddings, std=config.initializer_range)
    return Encoder(model, config, extractor)


@torch.no_grad()
def count_tokens(encoder: Encoder, setting: str, *, layer: int, audio_seconds: float | None) -> int:
    """Return how many features the encoder gives for one image or sound, by running it.

    Args:
        encoder: The encoder.
        setting: What named it, for errors.
        layer: Which of its hidden states is taken.
        audio_seconds: Length of a sound; None for an image.

    Raises:
        ValueError: It takes other input, its hidden states are not `[1, T, D_v]` of its width, or it does not hear the
            end of a sound.
    """
    try:
        if audio_seconds is None:
            image = Image.new("RGB", (64, 64))
            values = encoder.processor(image, return_tensors="pt")["pixel_values"]
        else:
            values = _hear(encoder.processor, audio_seconds, click=0.0)
            is_cut = torch.equal(values, _hear(encoder.processor, audio_seconds, click=_CLICK))
        states = encoder.model.eval()(values, output_hidden_states=True).hidden_states[layer]
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
        raise ValueError(f"{setting}: its encoder cannot be used ({first_line(error)})") from None
    if audio_seconds is not None and is_cut:
        raise ValueError(f"audio_seconds: got {audio_seconds:g}, expected less; what {setting} is given ends before")
    if states.ndim != 3 or states.shape[-1] != encoder.config.hidden_size:
        raise ValueError(
            f"{setting}: got hidden states {tuple(states.shape)}, expected [1, tokens, {encoder.config.hidden_size}]"
        )
    return states.shape[1]


def _hear(extractor: Any, seconds: float, *, click: float) -> torch.Tensor:
    """What an encoder is given of silence with a click at its end."""
    rate = extractor.sampling_rate
    sound: np.ndarray = np.zeros(round(seconds * rate), dtype=np.float32)
    sound[-round(_CLICK_SECONDS * rate) :: 2] = click
    made = extractor([sound], sampling_rate=rate, return_tensors="pt")
    values: torch.Tensor = made["input_features" if "input_features" in made else "input_values"]
    return values


def _configure(config_class: type, settings: dict[str, Any], setting: str) -> PreTrainedConfig:
    known = config_class().to_dict()
    for name in settings:
        if name not in known:
            raise ValueError(f"{setting}: got the unknown setting {name!r} of {config_class.__name__}")
    try:
        return config_class(**settings)
    except Exception as error:  # each configuration checks in its own way
        raise ValueError(f"{setting}: {' '.join(str(error).split())}") from None


def _load(name: str, setting: str, part: str, auto_processor: Any) -> Encoder:
    source = resolve_checkpoint(name, setting=setting)
    try:
        config = AutoConfig.from_pretrained(source)
        config = getattr(config, part, None) or config  # of CLIP and its like the half that is wanted
        model, found = AutoModel.from_pretrained(source, config=config, output_loading_info=True)
        processor = auto_processor.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        trouble = "cannot be loaded"
        if not Path(source).is_dir():
            trouble = "is not a local folder and could not be fetched from the Hub"
        raise ValueError(f"{setting}: {name} {trouble} ({first_line(error)})") from None
    model = model.get_encoder() if config.is_encoder_decoder else model
    wanted = {key.rpartition("encoder.")[2] for key, _ in model.named_parameters()}
    missing = sorted(
        key for key in found["missing_keys"] if "pool" not in key and key.rpartition("encoder.")[2] in wanted
    )
    if missing:
        raise ValueError(f"{setting}: {name} lacks {len(missing)} of the encoder's tensors, {missing[0]} among them")
    return Encoder(model, config, processor)
