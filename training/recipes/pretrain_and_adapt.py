"""The settings of the pretrain and adapt stages.

`pretrain` and `adapt` take them, the recipes under ``recipes/`` fill them, ``--help`` prints them. Kept apart from the
stages so that reading them imports neither torch nor transformers.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

from deepseek_training.recipes.bounds import BoundedSettings
from deepseek_training.recipes.loading import setting


@dataclasses.dataclass(kw_only=True)
class TrainerSettings(BoundedSettings):
    """What both stages ask of the trainer."""

    seed: int = setting(0, help="Seed of initialization, data order and dropout.")
    sequence_length: int = setting(256, help="Tokens a block; at most the model's context.")
    batch_size: int = setting(16, help="Blocks a step and device.")
    gradient_accumulation_steps: int = setting(1, help="Forward and backward passes an optimizer step.")
    max_steps: int = setting(help="Optimizer steps.")
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw",
        help="adamw, or muon: of each matrix of experts and linear layers by itself, AdamW for the rest.",
    )
    learning_rate: float = setting(help="Peak learning rate of the optimizer.")
    min_learning_rate_share: float = setting(0.1, help="Where the cosine ends, as a share of the peak, in [0, 1].")
    warmup_steps: int = setting(0, help="Steps in which the learning rate rises from 0.")
    weight_decay: float = setting(0.1, help="AdamW's weight decay (DeepSeek-V3: 0.1).")
    adam_beta2: float = setting(0.95, help="AdamW's second decay rate (DeepSeek-V3: 0.95).")
    max_grad_norm: float = setting(1.0, help="Gradients are clipped to this norm.")
    bias_update_speed: float | None = setting(
        None,
        help="Step of the experts' balancing bias (DeepSeek-V3: 0.001); null: the model's router_bias_update_speed.",
    )
    bf16: bool = setting(False, help="Train under bf16 autocast.")
    gradient_checkpointing: bool = setting(False, help="Recompute activations in the backward pass to save memory.")
    experts_implementation: Literal["fused_moe", "fused_moe_fp8", "grouped_mm", "batched_mm", "eager"] = setting(
        "fused_moe", help="How experts are computed: fused_moe, fused_moe_fp8, grouped_mm, batched_mm or eager."
    )
    eval_steps: int = setting(0, help="Steps between measurements on the held-out text; 0: only at the end.")
    eval_bytes: int | None = setting(
        None, help="UTF-8 bytes of each held-out set that are scored, the same share of each document; null: all."
    )
    logging_steps: int = setting(10, help="Steps between lines in metrics.jsonl.")
    save_steps: int = setting(0, help="Steps between checkpoints, a multiple of logging_steps; 0: none.")
    collective_timeout_s: int = setting(1800, help="Seconds a process waits for the others before it gives up.")
    report_to: list[str] | None = setting(  # noqa: RUF009
        None,
        help="Trackers that also get the figures, such as [wandb]; null: trackio, a local one, if installed.",
    )
    sample_prompts: list[str] = setting([], help="Prompts the finished model continues, for the report.")  # noqa: RUF009
    sample_tokens: int = setting(60, help="Tokens of each sample.")
    sample_steps: int = setting(0, help="Steps between samples during the training, for the report; 0: at its end.")
    # Inherited settings that a stage makes nothing of, with what it has in their place.
    unused: ClassVar[dict[str, str]] = {}
    least_steps: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if field.name in self.unused:
                is_left = getattr(self, field.name) == default
                self.require(field.name, is_left, f"{default}; it has no effect here: {self.unused[field.name]}")
        positive = ("sequence_length", "batch_size", "gradient_accumulation_steps", "logging_steps")
        for name in (*positive, "collective_timeout_s"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("max_steps", self.max_steps >= self.least_steps, f"at least {self.least_steps}")
        counts = ("eval_steps", "save_steps", "warmup_steps", "sample_tokens", "sample_steps")
        for name in (*counts, "weight_decay", "seed"):
            self.require(name, getattr(self, name) >= 0, "at least 0")
        self.require("sequence_length", self.sequence_length >= 4, "at least 4")
        self.require("seed", self.seed < 2**32, "below 2**32")
        self.require("learning_rate", 0 < self.learning_rate < math.inf, "above 0, and finite")
        self.require("weight_decay", self.weight_decay < math.inf, "finite")
        speed = self.bias_update_speed
        self.require("bias_update_speed", speed is None or 0 <= speed < math.inf, "null or at least 0, and finite")
        self.require("max_grad_norm", self.max_grad_norm > 0, "above 0")
        self.require("min_learning_rate_share", 0 <= self.min_learning_rate_share <= 1, "in [0, 1]")
        self.require("adam_beta2", 0 <= self.adam_beta2 < 1, "in [0, 1)")
        self.require(
            "warmup_steps", self.warmup_steps <= (self.max_steps or math.inf), f"at most max_steps={self.max_steps}"
        )
        self.require("eval_bytes", self.eval_bytes is None or self.eval_bytes >= 1000, "null or at least 1000")
        # A resumed run starts a new logging window, so a checkpoint inside one would change the logged means.
        steps = self.logging_steps
        self.require("save_steps", self.save_steps % steps == 0, f"a multiple of logging_steps={steps}")


# Settings that need whole experts, as they stand without effect.
_WHOLE_ONLY = {"lora_rank": 0, "esft_top_p": None, "mtp_loss_coef": None}


def _told(value: Any) -> str:
    return "null" if value is None else str(value)


@dataclasses.dataclass(kw_only=True)
class SplittableSettings(TrainerSettings):
    """What stages add that can split a model over processes."""

    expert_parallel_size: int = setting(
        1,
        help="Processes that share one set of experts; above 1 with untied embeddings only.",
    )
    save_in_background: bool = setting(
        False,
        help="Go on training while a checkpoint is written, from a copy in memory; where several processes write it "
        "in parts.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.expert_parallel_size
        self.require("expert_parallel_size", size >= 1, "at least 1")
        self.require("optimizer", size == 1 or self.optimizer == "adamw", f"adamw with expert_parallel_size={size}")
        for name, off in _WHOLE_ONLY.items():
            if size > 1 and hasattr(self, name):
                self.require(name, getattr(self, name) == off, f"{_told(off)} with expert_parallel_size={size}")
        is_saved = self.save_steps > 0 or not self.save_in_background
        self.require("save_in_background", is_saved, "false with save_steps=0")


@dataclasses.dataclass(kw_only=True)
class TextSettings(SplittableSettings):
    """What stages add that train on text."""

    max_steps: int = setting(0, help="Optimizer steps; 0: as many as epochs make.")
    epochs: float | None = setting(None, help="Passes over the text, in place of max_steps; null: max_steps says.")
    encoding: str = setting("utf-8", help="Encoding of text files.")
    packing: Literal["joined", "separate"] = setting(
        "joined",
        help="joined: documents one behind another, attention crosses from one to the next; separate: it does not.",
    )
    least_steps: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        epochs = self.epochs
        self.require("epochs", epochs is None or 0 < epochs < math.inf, "null or above 0, and finite")
        self.require("max_steps", self.max_steps > 0 or epochs is not None, "at least 1, or epochs")
        self.require("epochs", epochs is None or self.max_steps == 0, f"null with max_steps={self.max_steps}")


@dataclasses.dataclass(kw_only=True)
class LoraSettings(TrainerSettings):
    """What stages add that start from a model and may train an adapter of it only."""

    model: str = setting(help="The model to start from: a folder or Hub id.")
    lora_rank: int = setting(0, help="0 trains every weight; above, LoRA of this rank on frozen weights (PEFT).")
    lora_alpha: float | None = setting(None, help="LoRA's weight; null: twice lora_rank.")
    lora_targets: list[str] | None = setting(  # noqa: RUF009
        None,
        help="Names of modules and of experts' parameters that get an adapter; null: attention and routed experts, of "
        "a dense model every linear layer.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("lora_rank", self.lora_rank >= 0, "at least 0")
        self.require("optimizer", self.lora_rank == 0 or self.optimizer == "adamw", "adamw with lora_rank above 0")
        self.require("lora_alpha", self.lora_alpha is None or 0 < self.lora_alpha < math.inf, "null or above 0")
        for name in ("lora_alpha", "lora_targets"):
            self.require(name, self.lora_rank > 0 or getattr(self, name) is None, "null with lora_rank=0")


@dataclasses.dataclass(kw_only=True)
class EsftSettings(LoraSettings):
    """What stages add that may train only the experts that the text goes to."""

    esft_top_p: float | None = setting(
        None,
        help="Train only the experts of each layer that together take this share of the text (ESFT; its paper: 0.2); "
        "null: no such choice.",
    )
    esft_score: Literal["tokens", "gate"] | None = setting(
        None, help="What the share is of: tokens, or gate, the routers' weights; null: tokens."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        top_p = self.esft_top_p
        self.require("esft_top_p", top_p is None or 0 < top_p <= 1, "null, or above 0 and at most 1")
        self.require("esft_score", top_p is not None or self.esft_score is None, "null without esft_top_p")
        self.require("lora_rank", top_p is None or self.lora_rank == 0, f"0 with esft_top_p={top_p}")
        self.require("optimizer", top_p is None or self.optimizer == "adamw", f"adamw with esft_top_p={top_p}")
        # The bias belongs to the router, which stays as it is.
        is_still = top_p is None or not self.bias_update_speed
        self.require("bias_update_speed", is_still, f"null or 0 with esft_top_p={top_p}")


@dataclasses.dataclass(kw_only=True)
class MtpSettings(LoraSettings):
    """What stages add that can train a model's multi-token prediction layers."""

    mtp_loss_coef: float | None = setting(
        None,
        help="Weight of the multi-token prediction loss (DeepSeek-V3: 0.3, then 0.1), which trains these layers too; "
        "null: they are saved as they were.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        coef = self.mtp_loss_coef
        self.require("mtp_loss_coef", coef is None or 0 < coef < math.inf, "null or above 0, and finite")
        # PEFT freezes the layers.
        self.require("mtp_loss_coef", coef is None or self.lora_rank == 0, f"null with lora_rank={self.lora_rank}")


@dataclasses.dataclass(kw_only=True)
class PretrainRecipe(TextSettings):
    """The settings of `pretrain`."""

    data: str | list[dict[str, Any]] = setting(  # noqa: RUF009
        "books",
        help="Text to train on: embedded name, file, folder, datasets directory or Hub id; or a list of sources, each "
        "a mapping with path, and name, weight, column, encoding, languages, license, validation, validation_share.",
    )
    data_column: str | None = setting(None, help="Column that holds the text; null: text.")
    tokenizer: str | None = setting(None, help="Folder or Hub id of a tokenizer; null: train one on tokenizer_data.")
    tokenizer_data: list[str] = setting([], help="What a new tokenizer is trained on; empty: the training text.")  # noqa: RUF009
    vocab_size: int = setting(2048, help="Tokens of a new tokenizer, 259 to 10,000,000.")
    preset: str = setting("nano", help="Model size: 154b, 7.7b, 1b, 100m, 20m, nano or debug.")
    model: dict[str, Any] = setting(  # noqa: RUF009
        {},
        help="Settings of DeepseekConfig that replace the preset's.",
        otherwise="pretrain begins from scratch; to train a model on, run: deepseek-moe adapt RECIPE --model PATH",
    )
    check_bigram: bool = setting(True, help="Check that the model beats an interpolated bigram on the held-out text.")

    def __post_init__(self) -> None:
        super().__post_init__()
        # Above, the tokenizer's own reservation of memory ends the process without a word.
        is_sound = self.tokenizer is not None or 259 <= self.vocab_size <= 10_000_000
        self.require("vocab_size", is_sound, "in 259 to 10,000,000")


@dataclasses.dataclass(kw_only=True)
class AdaptRecipe(TextSettings, EsftSettings, MtpSettings):
    """The settings of `adapt`."""

    data: str | list[dict[str, Any]] = setting(  # noqa: RUF009
        "medicine", help="Text of the domain, named or listed as for pretrain."
    )
    data_column: str | None = setting(None, help="Column that holds the domain's text; null: text.")
    general_data: str | list[dict[str, Any]] = setting(  # noqa: RUF009
        "books", help="General text to replay and to check against forgetting, named or listed as for pretrain."
    )
    general_column: str | None = setting(None, help="Column that holds the general text; null: text.")
    replay_share: float = setting(0.25, help="Share of training blocks that are general text, in [0, 1).")
    min_domain_gain: float = setting(0.08, help="The check wants the domain's bits per byte to fall by this share.")
    max_general_loss: float = setting(0.04, help="The check lets the general bits per byte rise by this share.")
    stop_general_loss: float | None = setting(
        None,
        help="End the training at the first measurement (eval_steps) where general bits per byte have risen by more "
        "than this share, and take the model of the last measurement within it; null: never.",
    )
    stop_patience: int = setting(
        0, help="Measurements in a row above stop_general_loss that do not end the training; some losses come back."
    )
    long_tail: bool = setting(
        False,
        help="Measure before and after how the held-out domain text's loss depends on how often the training text "
        "names its words and topics; plots/long_tail.png.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("replay_share", 0 <= self.replay_share < 1, "in [0, 1)")
        is_left = self.esft_top_p is None or self.mtp_loss_coef is None  # ESFT freezes the layers
        self.require("mtp_loss_coef", is_left, f"null with esft_top_p={self.esft_top_p}")
        self.require("data", self.data != self.general_data, "another data set than general_data")
        bound, size = self.stop_general_loss, self.expert_parallel_size
        self.require("stop_general_loss", bound is None or 0 <= bound < math.inf, "null or at least 0, and finite")
        self.require("stop_general_loss", bound is None or self.eval_steps > 0, "null with eval_steps=0")
        self.require("stop_general_loss", bound is None or size == 1, f"null with expert_parallel_size={size}")
        patience = self.stop_patience
        self.require("stop_patience", patience >= 0, "at least 0")
        self.require("stop_patience", patience == 0 or bound is not None, "0 with stop_general_loss=null")
        if patience and self.max_steps:
            looks = math.ceil(self.max_steps / self.eval_steps)
            self.require("stop_patience", patience < looks, f"below the number of measurements, {looks}")
        self.require("long_tail", not self.long_tail or size == 1, f"false with expert_parallel_size={size}")
