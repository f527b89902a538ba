"""What makes a model's inputs of images, sounds and text: tokenizer, image processor and feature extractor in one.

A text holds one placeholder per image or sound, which the processor repeats as often as the encoder gives features.
There are three classes because transformers reads from a class which parts are to be loaded.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers.processing_utils import ProcessorMixin

IMAGE_TOKEN = "<image>"
AUDIO_TOKEN = "<audio>"


class MultimodalProcessor(ProcessorMixin):
    """What the three have in common."""

    image_seq_length: int | None = None
    audio_seq_length: int | None = None
    audio_seconds: float | None = None

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Return the tokens of one image."""
        assert self.image_seq_length is not None
        return self.image_token * self.image_seq_length

    def replace_audio_token(self, audio_inputs: dict[str, Any], audio_idx: int, **kwargs: Any) -> str:
        """Return the tokens of one sound."""
        assert self.audio_seq_length is not None
        return self.audio_token * self.audio_seq_length

    @property
    def unused_input_names(self) -> list[str]:
        """Outputs of the parts that the model does not take."""
        return ["input_features_mask", "input_values"]

    def _process_audio(self, audio: Sequence[np.ndarray], **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        """Fill each sound up with silence to `audio_seconds`, and give its features one name for every encoder."""
        rate = self.feature_extractor.sampling_rate
        if kwargs.get("sampling_rate") not in (None, rate):
            raise ValueError(f"sampling_rate: got {kwargs['sampling_rate']}, expected {rate}; resample the sound")
        length = round(self.audio_seconds * rate)
        filled = []
        for sound in audio:
            sound = np.asarray(sound, dtype=np.float32)
            if sound.ndim != 1 or not 0 < len(sound) <= length:
                raise ValueError(
                    f"audio: got shape {sound.shape}, expected one channel of 1 to {length} samples "
                    f"({self.audio_seconds:g} s at {rate} Hz)"
                )
            filled.append(np.pad(sound, (0, length - len(sound))))
        features = self.feature_extractor(filled, sampling_rate=rate, return_tensors="np")
        values = features["input_features" if "input_features" in features else "input_values"]
        tokens = [self.replace_audio_token({}, number) for number in range(len(filled))]
        return {"input_features": np.asarray(values, dtype=np.float32)}, tokens

    def _set(self, image_seq_length: int | None, audio_seq_length: int | None, audio_seconds: float | None) -> None:
        if image_seq_length is not None:
            self.image_seq_length = image_seq_length
            self.image_token, self.image_token_id = self._token(IMAGE_TOKEN)
        if audio_seq_length is not None:
            self.audio_seq_length, self.audio_seconds = audio_seq_length, audio_seconds
            self.audio_token, self.audio_token_id = self._token(AUDIO_TOKEN)

    def _token(self, text: str) -> tuple[str, int]:
        return text, self.tokenizer.convert_tokens_to_ids(text)


class ImageTextProcessor(MultimodalProcessor):
    """Of a model that sees.

    Args:
        image_processor: Of the vision encoder.
        tokenizer: With `<image>` among its special tokens.
        image_seq_length: Tokens per image.
        chat_template: Of transformers' processors.
    """

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, image_seq_length: int = 1, chat_template: Any = None
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self._set(image_seq_length, None, None)


class AudioTextProcessor(MultimodalProcessor):
    """Of a model that hears.

    Args:
        feature_extractor: Of the audio encoder.
        tokenizer: With `<audio>` among its special tokens.
        audio_seq_length: Tokens per sound.
        audio_seconds: Length to which sounds are filled up.
        chat_template: Of transformers' processors.
    """

    def __init__(
        self,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        audio_seq_length: int = 1,
        audio_seconds: float = 1.0,
        chat_template: Any = None,
    ) -> None:
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)
        self._set(None, audio_seq_length, audio_seconds)


class ImageAudioTextProcessor(MultimodalProcessor):
    """Of a model that sees and hears.

    Args:
        image_processor: Of the vision encoder.
        feature_extractor: Of the audio encoder.
        tokenizer: With `<image>` and `<audio>` among its special tokens.
        image_seq_length: Tokens per image.
        audio_seq_length: Tokens per sound.
        audio_seconds: Length to which sounds are filled up.
        chat_template: Of transformers' processors.
    """

    def __init__(
        self,
        image_processor: Any = None,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 1,
        audio_seq_length: int = 1,
        audio_seconds: float = 1.0,
        chat_template: Any = None,
    ) -> None:
        super().__init__(image_processor, feature_extractor, tokenizer, chat_template=chat_template)
        self._set(image_seq_length, audio_seq_length, audio_seconds)
