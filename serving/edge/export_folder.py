"""The folder that an export leaves: written beside its place, moved there when it is whole.

`onnx_export.py`, `browser_export.py` and `executorch_export.py` write into one. Beside the model stand tokenizer,
configuration, a README, and ``export.json``: what a program needs to run the model, and what was measured on it.
"""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek_records.output_paths import check_output, make_output
from deepseek_records.run_folder import write_json

if TYPE_CHECKING:  # a program that only runs an export need not load transformers
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPORT_FILE = "export.json"


@dataclasses.dataclass(frozen=True)
class CacheLayer:
    """Shape of one layer's cache, without batch and length.

    Args:
        num_heads: Heads that are cached; 1 with latent attention.
        key_width: Numbers per head and token of the first tensor: the key, or the latent.
        value_width: Of the second: the value, or the rotated part of the key.
    """

    num_heads: int
    key_width: int
    value_width: int


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What a program that runs an exported model needs to know.

    Args:
        model_type: Of the configuration.
        num_parameters: All of them.
        vocab_size: Width of the logits.
        context_length: Tokens that the model was made for.
        bos_token_id: The first token of a text; None where there is none.
        eos_token_ids: Tokens that end a text.
        cache: Per layer.
        num_moe_layers: L of `expert_weights`.
        num_experts: E of `expert_weights`.
        prompt_chunk: Prompt tokens to be read at once, as the gathered weights grow with them.
    """

    model_type: str
    num_parameters: int
    vocab_size: int
    context_length: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    cache: tuple[CacheLayer, ...]
    num_moe_layers: int
    num_experts: int
    prompt_chunk: int


@contextmanager
def whole_folder(output: str | Path) -> Iterator[Path]:
    """Give a folder to write into; it takes the output's place only when the block ends without an error.

    Args:
        output: The folder, empty or absent.

    Raises:
        FileExistsError: It holds files, or a file stands in its place.
        ValueError: It cannot be made.
    """
    output = check_free(output)
    make_output(output.parent)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        partial.replace(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(output: str | Path) -> Path:
    """Return the path of a folder that is empty or absent.

    Args:
        output: The folder.

    Raises:
        FileExistsError: It holds files, or a file stands in its place.
    """
    output = check_output(output)
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"output: got {output}, expected an empty or absent folder")
    return output


def write_companions(folder: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Write configuration and tokenizer.

    Args:
        folder: Where to.
        model: The model.
        tokenizer: Its tokenizer.

    Raises:
        ValueError: The tokenizer has no ``tokenizer.json``, the one form that all runtimes read.
    """
    model.config.to_json_file(folder / "config.json")  # save_pretrained adds our code, which nothing here runs
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"tokenizer: got {type(tokenizer).__name__}, expected a fast one, with tokenizer.json")


def write_report(
    folder: Path, form: str, facts: ModelFacts, measured: dict[str, Any], packages: tuple[str, ...]
) -> None:
    """Write ``export.json``.

    Args:
        folder: Where to; its files are listed with their sizes.
        form: As after ``--to``.
        facts: Of the model.
        measured: Plain JSON values.
        packages: Whose versions to note.
    """
    sizes = {
        str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
    }
    report = {
        "format": form,
        "model": dataclasses.asdict(facts),
        "measured": measured,
        "bytes": sizes,
        "versions": {name: metadata.version(name) for name in packages},
    }
    write_json(folder / REPORT_FILE, report)
