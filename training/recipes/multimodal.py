"""The settings of the multimodal stage, kept apart so that reading them imports neither torch nor transformers."""

import dataclasses
from typing import Any, ClassVar, Literal

from deepseek_training.recipes.bounds import BoundedSettings
from deepseek_training.recipes.loading import setting
from deepseek_training.recipes.pretrain_and_adapt import TrainerSettings

SMALL, NONE = "small", "none"


@dataclasses.dataclass(kw_only=True)
class EncoderSettings(BoundedSettings):
    """Which encoders a model gets, and what is taken of them."""

    vision_encoder: str = setting(
        SMALL, help="small: a new one of two layers; none; or a folder or Hub id of a vision backbone."
    )
    vision: dict[str, Any] = setting(  # noqa: RUF009
        {}, help="Settings of SiglipVisionConfig for the small one, in place of its own."
    )
    vision_layer: int = setting(-1, help="Which hidden states of the vision encoder are taken (LLaVA: -2).")
    vision_strategy: Literal["full", "default"] = setting(
        "full", help="full: every position; default: all but the first, where CLIP has its class token."
    )
    audio_encoder: str = setting(
        SMALL, help="small: a new one of two layers; none; or a folder or Hub id of an audio backbone."
    )
    audio: dict[str, Any] = setting({}, help="Settings of ASTConfig for the small one, in place of its own.")  # noqa: RUF009
    audio_layer: int = setting(-1, help="Which hidden states of the audio encoder are taken.")
    audio_seconds: float = setting(1.0, help="Length to which sounds are filled up; longer ones are refused.")


@dataclasses.dataclass(kw_only=True)
class MultimodalRecipe(EncoderSettings, TrainerSettings):
    """The settings of `multimodal`."""

    model: str = setting(help="The language model to start from: a folder or Hub id.")
    data: list[str] = setting(  # noqa: RUF009
        ["digits", "shapes", "tones"],
        help="Questions about images and sounds, a row of each source in turn: digits, shapes, tones, words, tables "
        "or folders with one, Hub ids.",
    )
    frozen_steps: int = setting(0, help="Steps at the start in which the language model stands still.")
    train_encoders: bool = setting(True, help="Train the encoders too, not only projectors and language model.")
    general_data: str | list[dict[str, Any]] = setting(  # noqa: RUF009
        "books", help="Text to replay and to check against forgetting, named or listed as for pretrain."
    )
    general_column: str | None = setting(None, help="Column that holds the text; null: text.")
    replay_share: float = setting(0.25, help="Share of the steps after frozen_steps that train on text, in [0, 1).")
    max_text_loss: float = setting(0.02, help="The check lets the text's bits per byte rise by this share.")
    num_eval_items: int | None = setting(None, help="Held-out questions of each source that are scored; null: all.")
    answer_tokens: int = setting(8, help="Tokens of an answer in samples, at most.")
    unused: ClassVar[dict[str, str]] = {
        "optimizer": "encoders are trained by AdamW",
        "sample_prompts": "held-out questions are answered",
        "sample_tokens": "answer_tokens says how long answers are",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("data", len(self.data) > 0, "at least one source")
        self.require("frozen_steps", 0 <= self.frozen_steps <= self.max_steps, f"in 0 to max_steps={self.max_steps}")
        self.require("replay_share", 0 <= self.replay_share < 1, "in [0, 1)")
        self.require("audio_seconds", 0 < self.audio_seconds <= 60, "above 0, at most 60")
        self.require("num_eval_items", self.num_eval_items is None or self.num_eval_items >= 2, "null or at least 2")
        self.require("answer_tokens", self.answer_tokens >= 1, "at least 1")
        for kind in ("vision", "audio"):
            name, given = getattr(self, f"{kind}_encoder"), getattr(self, kind)
            self.require(kind, not given or name == SMALL, f"nothing with {kind}_encoder={name}")
        both_absent = self.vision_encoder == self.audio_encoder == NONE
        self.require("vision_encoder", not both_absent, f"an encoder; audio_encoder is {NONE} too")
