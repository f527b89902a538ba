"""The configuration of a language model with a vision encoder, an audio encoder, or both before it.

The parts are configurations of transformers, whatever their families: `text_config` of a causal language model, ours
or not, `vision_config` and `audio_config` of encoders. Importing this file makes our text configuration known to
transformers, for a checkpoint's remote code may be read before anything else of ours.
"""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .configuration_deepseek import DeepseekConfig

_PARTS = ("text_config", "vision_config", "audio_config")
_STRATEGIES = ("full", "default")

if DeepseekConfig.model_type not in CONFIG_MAPPING:  # the package itself registers it before
    AutoConfig.register(DeepseekConfig.model_type, DeepseekConfig)


class DeepseekMultimodalConfig(PreTrainedConfig):
    """Settings of `DeepseekMultimodalForConditionalGeneration`.

    Args:
        text_config: Of the language model, or a dictionary with its `model_type`.
        vision_config: Of the vision encoder, likewise; None for a model that does not see.
        audio_config: Of the audio encoder, likewise; None for a model that does not hear.
        image_token_id: Token in whose places an image's features go.
        audio_token_id: Token in whose places a sound's features go.
        image_seq_length: Tokens per image.
        audio_seq_length: Tokens per sound.
        projector_hidden_act: Activation between the two linear layers of a projector.
        vision_feature_layer: Which of the vision encoder's hidden states is taken (LLaVA: -2).
        vision_feature_select_strategy: `full` takes every position, `default` all but the first (the class token).
        audio_feature_layer: Which of the audio encoder's hidden states is taken.
        tie_word_embeddings: Whether the head is the embedding; None: as the language model has it.

    Raises:
        ValueError: There is no encoder, a part is unknown to transformers, or a strategy is.
    """

    model_type = "deepseek_multimodal"
    sub_configs = dict.fromkeys(_PARTS, AutoConfig)

    text_config: Any = None
    vision_config: Any = None
    audio_config: Any = None
    image_token_id: int | None = None
    audio_token_id: int | None = None
    image_seq_length: int | None = None
    audio_seq_length: int | None = None
    projector_hidden_act: str = "gelu"
    vision_feature_layer: int = -1
    vision_feature_select_strategy: str = "full"
    audio_feature_layer: int = -1
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in _PARTS:
            value = getattr(self, name)
            if isinstance(value, dict):
                setattr(self, name, _build(name, value))
        if self.text_config is None:
            self.text_config = DeepseekConfig()
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        if self.vision_feature_select_strategy not in _STRATEGIES:
            raise ValueError(
                f"vision_feature_select_strategy: got {self.vision_feature_select_strategy!r}, expected "
                f"{' or '.join(_STRATEGIES)}"
            )
        super().__post_init__(**kwargs)


def _build(name: str, settings: dict[str, Any]) -> PreTrainedConfig:
    model_type = settings.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"{name}: got model_type {model_type!r}, expected one that transformers knows")
    return CONFIG_MAPPING[model_type](**settings)
