"""A language model that sees and hears: features of encoders stand in the places of image and audio tokens.

    image [3, H, W] -> vision encoder [T, D_v] -> projector [T, D] -> the T image tokens of the prompt

and likewise for sounds. The shape is LLaVA's (encoder, projector of two layers, language model), and so are the names
of the weights: one with a vision encoder only computes what `transformers.LlavaForConditionalGeneration` does. The
routers see hidden states of image, audio and text tokens alike; nothing routes by kind.

Reference: Liu et al., 2023, "Improved Baselines with Visual Instruction Tuning", arXiv 2310.03744; Lu et al., 2024,
"DeepSeek-VL", arXiv 2403.05525, which has the stages. Differences: audio; one size of image.

Axes: B rows, S tokens, M images or sounds of the whole batch, T tokens of each, D hidden.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_deepseek import DeepseekConfig
from .configuration_multimodal import DeepseekMultimodalConfig
from .modeling_deepseek import DeepseekModel


class MultimodalProjector(nn.Module):
    """Takes an encoder's features to the language model's width: linear, activation, linear.

    Args:
        width: D_v, the encoder's.
        config: Names the activation and the language model.
    """

    def __init__(self, width: int, config: DeepseekMultimodalConfig) -> None:
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.linear_1 = nn.Linear(width, hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return `[M, T, D]` of `[M, T, D_v]`."""
        return self.linear_2(self.act(self.linear_1(features)))


def build_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a new encoder; of a model with a decoder, such as Whisper, the encoder.

    Args:
        config: Of any vision or audio backbone that `AutoModel` knows.
    """
    model = AutoModel.from_config(config)
    return model.get_encoder() if config.is_encoder_decoder else model


def build_decoder(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a new language model without its head.

    Ours is told by name: a checkpoint's remote code may bring the configuration's class a second time.

    Args:
        config: Of any family that `AutoModel` knows, or ours.
    """
    is_ours = config.model_type == DeepseekConfig.model_type
    return DeepseekModel._from_config(config) if is_ours else AutoModel.from_config(config)


class DeepseekMultimodalPreTrainedModel(PreTrainedModel):
    """Names the configuration to transformers."""

    config: DeepseekMultimodalConfig
    config_class = DeepseekMultimodalConfig
    base_model_prefix = "model"
    input_modalities = ("image", "audio", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["e_score_correction_bias", "share.state"]  # noqa: RUF012


class DeepseekMultimodalModel(DeepseekMultimodalPreTrainedModel):
    """Encoders, projectors and the language model without its head.

    Args:
        config: The configuration.
    """

    def __init__(self, config: DeepseekMultimodalConfig) -> None:
        super().__init__(config)
        if config.vision_config is not None:
            self.vision_tower = build_encoder(config.vision_config)
            self.multi_modal_projector = MultimodalProjector(config.vision_config.hidden_size, config)
        if config.audio_config is not None:
            self.audio_tower = build_encoder(config.audio_config)
            self.audio_projector = MultimodalProjector(config.audio_config.hidden_size, config)
        self.language_model = build_decoder(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace it.

        Args:
            value: The new one.
        """
        self.language_model.set_input_embeddings(value)

    def freeze_encoders(self) -> None:
        """Keep the encoders as they are while the rest is trained."""
        for name in ("vision_tower", "audio_tower"):
            if hasattr(self, name):
                getattr(self, name).requires_grad_(False)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return what stands for the images.

        Args:
            pixel_values: `[M, 3, H, W]`, from the processor.

        Returns:
            `[M, T, D]`.
        """
        states = self.vision_tower(pixel_values.to(self.vision_tower.dtype), output_hidden_states=True).hidden_states
        features = states[self.config.vision_feature_layer]
        if self.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        return self.multi_modal_projector(features)

    def get_audio_features(self, input_features: torch.Tensor) -> torch.Tensor:
        """Return what stands for the sounds.

        Args:
            input_features: `[M, ...]`, from the processor, as the audio encoder takes them.

        Returns:
            `[M, T, D]`.
        """
        output = self.audio_tower(input_features.to(self.audio_tower.dtype), output_hidden_states=True)
        # The last one after the encoder's norm, where it has one: before, a new AST's are a tenth of a unit in size.
        is_last = self.config.audio_feature_layer == -1
        features = output.last_hidden_state if is_last else output.hidden_states[self.config.audio_feature_layer]
        return self.audio_projector(features)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the language model's hidden states.

        Args:
            input_ids: `[B, S]`, with T image tokens per image and T audio tokens per sound, in the rows' order.
            attention_mask: `[B, S]`.
            pixel_values: `[M, 3, H, W]`.
            input_features: `[M, ...]`.
            inputs_embeds: `[B, S, D]` in place of `input_ids`, and then of images and sounds too.
            **kwargs: For the language model.

        Raises:
            ValueError: There are more or fewer image or audio tokens than features, or nothing to put them by.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        given = (
            ("pixel_values", pixel_values, self.config.image_token_id, self.get_image_features),
            ("input_features", input_features, self.config.audio_token_id, self.get_audio_features),
        )
        for name, values, token_id, encode in given:
            if values is None:
                continue
            if token_id is None or input_ids is None:
                raise ValueError(f"{name}: got some, expected none; the model has no encoder for it, or no input_ids")
            features = encode(values).to(inputs_embeds.dtype)
            places_BS = input_ids == token_id
            if int(places_BS.sum()) != features.shape[0] * features.shape[1]:
                raise ValueError(
                    f"{name}: got {features.shape[0]} of {features.shape[1]} tokens each, expected as many as the "
                    f"{int(places_BS.sum())} places for them in input_ids"
                )
            inputs_embeds = inputs_embeds.masked_scatter(places_BS.unsqueeze(-1), features)
        kwargs.pop("mm_token_type_ids", None)
        return self.language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)


class DeepseekMultimodalForConditionalGeneration(DeepseekMultimodalPreTrainedModel, GenerationMixin):
    """Writes text after images, sounds and text.

    Args:
        config: The configuration.
    """

    def __init__(self, config: DeepseekMultimodalConfig) -> None:
        super().__init__(config)
        self.model = DeepseekMultimodalModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace it.

        Args:
            value: The new one.
        """
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace it.

        Args:
            value: The new one.
        """
        self.lm_head = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits, and with labels the loss.

        Args:
            input_ids: As for `DeepseekMultimodalModel`, like all but what follows.
            attention_mask: Likewise.
            pixel_values: Likewise.
            input_features: Likewise.
            inputs_embeds: Likewise.
            labels: `[B, S]`, -100 where nothing is to be learned.
            logits_to_keep: Of how many of the last tokens logits are wanted; 0 for all.
            **kwargs: For the language model and the loss.
        """
        of_loss = {"num_items_in_batch": kwargs.pop("num_items_in_batch", None)}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            input_features=input_features,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        states = outputs.last_hidden_state
        logits = self.lm_head(states if isinstance(kept, int) else states[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **of_loss
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
