"""A model made ready to score: dtype, device, adapter, experts implementation, context length.

Called by ``harness.py``; the loading itself is `deepseek_records.loading`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepseek_eval.served_model import ServedModel
from deepseek_records import loading
from modeling_deepseek import DeepseekMultimodalConfig

# What lm-evaluation-harness 0.4.13 assumes when neither model nor tokenizer names a context length.
DEFAULT_MAX_LENGTH = 2048
_LENGTH_SETTINGS = ("n_positions", "max_position_embeddings", "n_ctx")
# transformers writes this number for "no limit".
_NO_LIMIT = 10**29


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to score, with its tokenizer.

    Args:
        model: A `PreTrainedModel` in evaluation mode on its device, or a `ServedModel`.
        tokenizer: As saved beside the model.
        max_length: The context in tokens.
        processor: Of a model that sees or hears, which also holds the tokenizer.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    processor: Any = None


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    adapter: str | None = None,
    experts_implementation: str | None = None,
) -> LoadedModel:
    """Load a causal model and its tokenizer.

    Args:
        name_or_path: A checkpoint folder, a run folder of ours, or a Hub id.
        dtype: ``auto`` (as saved), ``float32``, ``bfloat16`` or ``float16``.
        device: A torch device; None takes the first GPU, else the CPU.
        trust_remote_code: Run code that comes with the checkpoint.
        adapter: A PEFT adapter to put on top, folder or Hub id.
        experts_implementation: How transformers runs a MoE layer, for example ``grouped_mm``.

    Raises:
        FileNotFoundError: A local path is absent or holds no checkpoint.
        ValueError: The device is not there, the checkpoint is damaged, its tokenizer is larger than the model, or a
            Hub id cannot be fetched.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if experts_implementation is not None:
        options["experts_implementation"] = experts_implementation
    model = loading.load_model(name_or_path, **options)
    tokenizer = loading.load_tokenizer(name_or_path, trust_remote_code=trust_remote_code)
    if adapter is not None:
        model = _add_adapter(model, adapter)
    loading.check_vocabulary(model, tokenizer)
    is_multimodal = isinstance(model.config, DeepseekMultimodalConfig)
    processor = loading.load_processor(name_or_path) if is_multimodal else None
    return LoadedModel(model.eval().to(device), tokenizer, find_max_length(model.config, tokenizer), processor)


def load_served(url: str, tokenizer: str, *, trust_remote_code: bool = False) -> LoadedModel:
    """Return a model behind a server, with its tokenizer.

    Args:
        url: The server, with OpenAI's protocol.
        tokenizer: Where the model's tokenizer lies: a checkpoint or run folder, or a Hub id.
        trust_remote_code: Run code that comes with the tokenizer.

    Raises:
        FileNotFoundError: There is no such tokenizer.
        RunFailedError: The server does not answer.
    """
    loaded = loading.load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    model = ServedModel(url)
    length = model.max_length
    if length is None:
        length = loaded.model_max_length if loaded.model_max_length < _NO_LIMIT else DEFAULT_MAX_LENGTH
    return LoadedModel(model, loaded, length)


def limit_context(loaded: LoadedModel, max_length: int | None) -> LoadedModel:
    """Return the model with a shorter context.

    Args:
        loaded: The model.
        max_length: Tokens that it may see at once; None leaves the context as it is.

    Raises:
        ValueError: It has no such long context.
    """
    if max_length is None:
        return loaded
    if max_length > loaded.max_length:
        raise ValueError(f"max_length: got {max_length}, expected at most {loaded.max_length}, the model's context")
    return replace(loaded, max_length=max_length)


def _check_device(device: str) -> None:
    """Refuse a device that is not there before minutes go into loading."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # Torch built without CUDA asserts.
        raise ValueError(f"device = {device!r} cannot be used ({loading.first_line(error)})") from None


def _add_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, loading.resolve_checkpoint(adapter)).merge_and_unload()
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        # ValueError and RuntimeError: made for another architecture, or for another size of this one.
        raise ValueError(f"adapter: {adapter} cannot be loaded ({loading.first_line(error)})") from None


def find_max_length(config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the context length by the order lm-evaluation-harness looks it up.

    Args:
        config: The model's configuration; foreign ones name the length differently, hence the search.
        tokenizer: Asked when the configuration is silent.
    """
    text_config = config.get_text_config()
    for name in _LENGTH_SETTINGS:
        if hasattr(text_config, name):
            return getattr(text_config, name)
    if tokenizer.model_max_length and tokenizer.model_max_length < _NO_LIMIT:
        return tokenizer.model_max_length
    return DEFAULT_MAX_LENGTH
