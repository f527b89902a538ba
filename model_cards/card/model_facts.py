"""What a model's folder says about itself: its configuration, or its adapter's, and which files lie beside it.

The card, the report and the upload ask here, so that a sentence about experts or a router is written only where the
configuration holds it. Families name their settings differently; the names are those of transformers' classes.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from deepseek_records.json_files import read_object

OURS = "deepseek_moe"
MULTIMODAL = "deepseek_multimodal"
# What `block_picture` draws and describes truly: latent attention and DeepSeek-V3's router, or ours.
DRAWN = (OURS, "deepseek_v3")
_ROUTED = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
_ACTIVE = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "num_selected_experts",
)
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model from its folder.

    Args:
        path: The folder; None where there is none.
        config: Its ``config.json``; empty where it has none.
        adapter: Its ``adapter_config.json``; empty where it has none.
    """

    path: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def language_config(self) -> dict[str, Any]:
        """The settings of the language model; multimodal families keep them in a part of their own."""
        inner = self.config.get("text_config")
        return {**self.config, **inner} if isinstance(inner, dict) else self.config

    @property
    def model_type(self) -> str:
        """The family's name in transformers; empty where it is not known."""
        return str(self.config.get("model_type") or "")

    @property
    def is_adapter(self) -> bool:
        """True for a PEFT adapter without its base model."""
        return bool(self.adapter) and not self.config

    @property
    def is_classifier(self) -> bool:
        """True for a sequence classifier."""
        return any("SequenceClassification" in name for name in self.config.get("architectures") or [])

    @property
    def sees(self) -> bool:
        """True where it takes images."""
        return bool(self.config.get("vision_config"))

    @property
    def hears(self) -> bool:
        """True where it takes sounds."""
        return bool(self.config.get("audio_config"))

    @property
    def pipeline_tag(self) -> str:
        """The task, as the Hub calls it."""
        if self.is_classifier:
            return "text-classification"
        return "image-text-to-text" if self.sees else "audio-text-to-text" if self.hears else "text-generation"

    @property
    def is_drawn(self) -> bool:
        """True where the picture of the block and its captions are of this architecture."""
        return self.model_type in DRAWN and bool(self.config.get("n_routed_experts"))

    @property
    def num_routed_experts(self) -> int | None:
        """Routed experts per layer; None where there are none, or the layers differ."""
        return _first_int(self.language_config, _ROUTED)

    @property
    def num_active_experts(self) -> int | None:
        """The most routed experts that a token uses."""
        return _first_int(self.language_config, _ACTIVE) if self.num_routed_experts else None

    @property
    def has_tokenizer(self) -> bool:
        """True where a tokenizer lies in the folder."""
        return self.path is not None and any((self.path / name).is_file() for name in _TOKENIZER)

    @property
    def has_own_code(self) -> bool:
        """True where the folder carries the code that its configuration names."""
        named = (self.config.get("auto_map") or {}).values() if isinstance(self.config.get("auto_map"), dict) else ()
        files = {str(name).partition("--")[2] or str(name) for name in named if isinstance(name, str)}
        files = {f"{name.partition('.')[0]}.py" for name in files}
        return self.path is not None and bool(files) and all((self.path / name).is_file() for name in files)

    @property
    def base(self) -> str | None:
        """The model that the adapter goes on, as the adapter names it."""
        return self.adapter.get("base_model_name_or_path") or None


def read_facts(path: Path | None) -> ModelFacts:
    """Return what a model's folder says.

    Args:
        path: The folder, or None.

    Raises:
        ValueError: A configuration is not a JSON object.
    """
    if path is None:
        return ModelFacts()
    found = {
        key: read_object(path / name, "model") if (path / name).is_file() else {}
        for key, name in (("config", "config.json"), ("adapter", "adapter_config.json"))
    }
    return ModelFacts(path, **found)


def _first_int(config: dict[str, Any], names: tuple[str, ...]) -> int | None:
    values = (config.get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool) and value), None)
