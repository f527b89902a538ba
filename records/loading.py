"""Loads models and tokenizers, ours or not, local or from the Hub, and says in one line why it cannot.

Every stage calls it (`training`, `eval` and `cli` all may import this package, but not one another).
Importing `modeling_deepseek` here is what lets our checkpoints load without remote code, and a run folder counts as a
checkpoint (its ``model/`` subfolder is taken).
"""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from deepseek_records.checkpoint_parts import is_in_parts
from deepseek_records.json_files import read_object
from deepseek_records.kept_mtp import keep_mtp
from modeling_deepseek import (
    DeepseekConfig,
    DeepseekForCausalLM,
    DeepseekForSequenceClassification,
    DeepseekModel,
    DeepseekMultimodalConfig,
    FourBitExpertsConfig,
)
from modeling_deepseek.checkpoint_check import check_index
from modeling_deepseek.four_bit_experts import has_four_bits
from modeling_deepseek.packed_checkpoint import packed_settings

_CONFIG_FILES = ("config.json", "adapter_config.json")
# The classes that load DeepSeek-V3's own checkpoints in the Auto classes' place.
_OWN_CLASSES: dict[type, type] = {
    AutoModel: DeepseekModel,
    AutoModelForCausalLM: DeepseekForCausalLM,
    AutoModelForSequenceClassification: DeepseekForSequenceClassification,
}
# What torch's restricted reader raises at a pickle that is damaged or holds more than tensors.
_PICKLE_ERRORS = (UnpicklingError, EOFError, LookupError, AttributeError, TypeError, AssertionError)
# Of every kind of tokenizer in transformers at least one.
_TOKENIZER_FILES = ("tokeniz*", "*.tokenizer", "*.model", "*vocab*", "*.bpe", "*.tiktoken", "*tekken*")


def load_model(
    name_or_path: str | Path,
    *,
    auto_class: type = AutoModelForCausalLM,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Return the model of a checkpoint, in evaluation mode.

    Args:
        name_or_path: A checkpoint folder, a run folder of ours, a folder with a PEFT adapter, which is merged into its
            base model, or a Hub id.
        auto_class: The Auto class, or one of our model classes.
        trust_remote_code: Run code that comes with the checkpoint.
        **options: For `from_pretrained`, for example ``dtype`` or ``experts_implementation``.

    Raises:
        FileNotFoundError: A local path is absent, holds no checkpoint or lacks a shard.
        ValueError: The checkpoint is damaged, asks for a library that is not there, or a Hub id cannot be fetched.
    """
    source = resolve_checkpoint(name_or_path)
    if is_adapter(source):
        return merge_adapter(source, auto_class=auto_class, trust_remote_code=trust_remote_code, **options)
    _check_json("model", source, ("config.json",))
    _check_quantization(source)
    check_index(source)
    auto_class = _choose_class(auto_class, source)
    packed = packed_settings(source)
    if packed is not None:  # transformers would make such experts dense
        config_class = DeepseekConfig if auto_class in _OWN_CLASSES.values() else AutoConfig
        options["config"] = options.get("config") or _load(config_class, "model", source)
        options["config"].quantization_config = FourBitExpertsConfig(**packed).to_dict()
    model, found = _load(
        auto_class, "model", source, trust_remote_code=trust_remote_code, output_loading_info=True, **options
    )
    # A score head is what a policy's checkpoint lacks by design; any other gap would be filled with random numbers.
    missing = sorted(key for key in found["missing_keys"] if not key.startswith("score."))
    if missing:
        raise ValueError(f"model: {source} lacks {len(missing)} of the model's tensors, among them {missing[0]}")
    _train_every_token(model)
    if auto_class is AutoModelForCausalLM:
        keep_mtp(model, source)
    return model


def load_tokenizer(
    name_or_path: str | Path, *, trust_remote_code: bool = False, setting: str = "model"
) -> PreTrainedTokenizerBase:
    """Return the tokenizer that lies with a checkpoint.

    Args:
        name_or_path: A checkpoint folder, a run folder of ours, or a Hub id.
        trust_remote_code: Run code that comes with the checkpoint.
        setting: What a message calls the name.

    Raises:
        FileNotFoundError: A local path is absent or holds no tokenizer.
        ValueError: A file is damaged, or a Hub id cannot be fetched.
    """
    marks = (*_CONFIG_FILES, "tokenizer.json", "tokenizer_config.json")
    source = resolve_checkpoint(name_or_path, marks=marks, setting=setting)
    if is_adapter(source) and not _has_tokenizer(Path(source)):
        return load_tokenizer(base_of_adapter(source), trust_remote_code=trust_remote_code)
    _check_json("tokenizer", source, ("config.json", "tokenizer.json", "tokenizer_config.json"))
    _check_quantization(source)
    if Path(source).is_dir() and not _has_tokenizer(Path(source)):
        raise FileNotFoundError(f"tokenizer: {source} holds none, expected tokenizer.json or a vocabulary")
    return _load(AutoTokenizer, "tokenizer", source, trust_remote_code=trust_remote_code)


def load_processor(name_or_path: str | Path) -> Any:
    """Return the processor of a model that sees or hears: its tokenizer, image processor and feature extractor.

    Args:
        name_or_path: A checkpoint folder, a run folder of ours, or a Hub id.

    Raises:
        FileNotFoundError: A local path is absent or holds no checkpoint.
        ValueError: A file is damaged, or a Hub id cannot be fetched.
    """
    source = resolve_checkpoint(name_or_path)
    _check_json("processor", source, ("config.json", "processor_config.json", "tokenizer_config.json"))
    return _load(AutoProcessor, "processor", source)


def load_config(name_or_path: str | Path) -> PreTrainedConfig:
    """Return the configuration that lies in a checkpoint.

    Args:
        name_or_path: A checkpoint folder, a run folder of ours, or a Hub id.

    Raises:
        FileNotFoundError: A local path is absent or holds no checkpoint.
        ValueError: ``config.json`` is damaged or refused, or a Hub id cannot be fetched.
    """
    source = resolve_checkpoint(name_or_path)
    _check_json("model", source, ("config.json",))
    config: PreTrainedConfig = _load(AutoConfig, "model", source)
    return config


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with ids that the model's embedding has no rows for, before a batch fails at one of them.

    Args:
        model: The model.
        tokenizer: What encodes for it.

    Raises:
        ValueError: An id is too large.
    """
    num_rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= num_rows:
        raise ValueError(
            f"tokenizer: got ids up to {largest}, expected them below {num_rows}, the rows of the model's embedding; "
            "the tokenizer is another model's, or tokens were added and the model not resized"
        )


def _has_tokenizer(folder: Path) -> bool:
    return any(list(folder.glob(pattern)) for pattern in _TOKENIZER_FILES)


def is_adapter(source: str) -> bool:
    """Return whether a folder holds a PEFT adapter and no whole model.

    Args:
        source: From `resolve_checkpoint`.
    """
    folder = Path(source)
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def base_of_adapter(source: str) -> str:
    """Return the model that an adapter was trained on.

    Args:
        source: The adapter's folder.

    Raises:
        FileNotFoundError: The adapter does not name it, or names a local path where nothing lies.
    """
    settings = read_object(Path(source, "adapter_config.json"), "adapter")
    name = settings.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise FileNotFoundError(
            f"adapter: {source} does not name its base model; write it into base_model_name_or_path of its "
            "adapter_config.json"
        )
    beside = Path(source, name)
    if not Path(name).expanduser().exists() and beside.exists():
        return str(beside)
    try:
        return resolve_checkpoint(name)
    except FileNotFoundError:
        raise FileNotFoundError(f"adapter: got {source} of the base model {name}, which does not exist") from None


def merge_adapter(source: str, base: str | None = None, **options: Any) -> PreTrainedModel:
    """Return an adapter's base model with the adapter added to its weights.

    Args:
        source: The adapter's folder.
        base: Another base model than the one that the adapter names.
        **options: For `load_model`.

    Raises:
        FileNotFoundError: There is no base model.
        ValueError: The adapter does not fit it.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    model = load_model(base_of_adapter(source) if base is None else base, **options)
    try:
        settings = PeftConfig.from_pretrained(source)
        if settings.target_parameters and has_four_bits(model):
            raise ValueError(
                "its base model's experts are in 4 bits; merge it into the model they were quantized from"
            )
        settings.task_type = None  # or PEFT looks for generation in a sequence classifier
        adapted = PeftModel.from_pretrained(model, source, config=settings)
        saved = load_peft_weights(source, device="cpu").keys()
        known = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
        strangers = sorted({name for name in saved if ".lora_" in name} - known)
        if strangers:  # PEFT only warns
            raise ValueError(
                f"{len(strangers)} of its {len(saved)} tensors belong to no module, {strangers[0]} among them"
            )
        merged = adapted.merge_and_unload().eval()
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"adapter: {source} cannot be put on its base model ({first_line(error)})") from None
    for parameter in merged.parameters():  # PEFT leaves them frozen
        parameter.requires_grad_(parameter.is_floating_point())
    return merged


def resolve_checkpoint(
    name_or_path: str | Path, *, marks: tuple[str, ...] = _CONFIG_FILES, setting: str = "model"
) -> str:
    """Return a folder with a checkpoint, or the name unchanged when it can only be a Hub id.

    Args:
        name_or_path: A checkpoint folder, a run folder of ours, or a Hub id.
        marks: Files of which a folder must hold one.
        setting: What a message calls the name.

    Raises:
        FileNotFoundError: A local path is absent or holds no checkpoint.
        ValueError: The checkpoint is in parts.
    """
    path = Path(name_or_path).expanduser()
    if path.is_symlink() and path.is_dir():
        path = path.resolve()  # of a link that moves, as `update` keeps one, all files are of one model
    if (path / "model" / "config.json").is_file():
        return str(path / "model")
    if path.is_dir():
        if not any((path / name).is_file() for name in marks):
            raise FileNotFoundError(f"{setting}: {path} holds no config.json, expected a checkpoint or a finished run")
        if is_in_parts(path):
            raise ValueError(
                f"{setting}: {path} was written in parts by several processes; put them together first: deepseek-moe "
                f"export {path} OUTPUT"
            )
        return str(path)
    name = str(name_or_path)
    if path.exists():
        raise FileNotFoundError(f"{setting}: {path} is a file, expected a checkpoint folder or a Hub id")
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise FileNotFoundError(f"{setting}: {name!r} does not exist, expected a checkpoint folder or a Hub id")
    return name


def auto_class_of(config: PreTrainedConfig) -> Any:
    """Return the Auto class of a language model; of one that sees or hears another one, for text works alike.

    Args:
        config: Its configuration.
    """
    return AutoModelForImageTextToText if isinstance(config, DeepseekMultimodalConfig) else AutoModelForCausalLM


def _choose_class(auto_class: type, source: str) -> type:
    """Our class for DeepSeek-V3's own checkpoints: it keeps prediction layers, reads FP8 right, checks the files."""
    own = _OWN_CLASSES.get(auto_class)
    if own is None:
        return auto_class
    try:
        settings, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError):  # the load that follows says in one line why
        return auto_class
    if auto_class is AutoModelForCausalLM and settings.get("model_type") == DeepseekMultimodalConfig.model_type:
        return AutoModelForImageTextToText
    return own if settings.get("model_type") == "deepseek_v3" else auto_class


def _train_every_token(model: PreTrainedModel) -> None:
    """Where padding is written as the end or begin token, let that token's embedding be trained.

    torch gives the padding's row no gradient. Our own models see to it by themselves.
    """
    embedding, config = model.get_input_embeddings(), model.config.get_text_config()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    padding = getattr(embedding, "padding_idx", None)
    if padding is not None and padding in (*ends, config.bos_token_id):
        embedding.padding_idx = None


def _check_json(what: str, source: str, names: tuple[str, ...]) -> None:
    """Name the file that is cut short or no JSON object, where transformers' errors name a line and column only."""
    for path in (Path(source, name) for name in names):
        if path.is_file():
            read_object(path, what)


def _check_quantization(source: str) -> None:
    """Refuse what transformers fails at in its depths, and an unknown method: it reads the weights as plain ones."""
    path = Path(source, "config.json")
    settings = read_object(path, "model").get("quantization_config") if path.is_file() else None
    if settings is None:
        return
    if not isinstance(settings, dict):
        raise ValueError(f"model: {path}: quantization_config: got {type(settings).__name__}, expected an object")
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = settings.get("quant_method")
    known = sorted({*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes"})
    if method is not None and method not in known:
        raise ValueError(f"model: {path}: quant_method: got {method!r}, expected one of {', '.join(known)}")


def _load(auto_class: type, what: str, source: str, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(source, **options)
    except SafetensorError as error:
        raise ValueError(f"{what}: the weights in {source} are damaged or cut short ({first_line(error)})") from None
    except RuntimeError as error:
        # transformers logs a table of the tensors and raises this where shapes differ from the configuration's.
        raise ValueError(f"{what}: the weights in {source} do not fit its config.json ({first_line(error)})") from None
    except _PICKLE_ERRORS:  # torch's holds advice to switch its protection off
        if not list(Path(source).glob("*.bin")):
            raise
        raise ValueError(
            f"{what}: {source} holds pickle weights that are damaged or hold more than tensors, which could run code; "
            "convert them to safetensors"
        ) from None
    except ImportError as error:
        raise ValueError(f"{what}: {source} asks for a library that is not installed ({first_line(error)})") from None
    except OSError as error:
        if Path(source).is_dir():
            raise FileNotFoundError(f"{what}: {source} is not whole ({first_line(error)})") from None
        raise ValueError(
            f"{what}: {source} is not a local folder and could not be fetched from the Hub; pass a checkpoint folder, "
            f"or download it first ({first_line(error)})"
        ) from None
    except StrictDataclassError as error:  # a setting of the wrong type
        raise ValueError(
            f"{what}: {source} has a config.json that is refused ({' '.join(str(error).split())})"
        ) from None
    except ValueError as error:  # Upstream's are long: an unknown architecture, no usable tokenizer file.
        hint = "; trust_remote_code (--trust-remote-code) runs it" if "trust_remote_code" in str(error) else ""
        raise ValueError(f"{what}: {source} cannot be loaded ({first_line(error)}){hint}") from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name if it has none.

    Args:
        error: Any exception.
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
