"""A checkpoint between two others: each weight a step from the old value to the new one.

    W(alpha) = old + alpha (new - old)

`deepseek-moe update` makes its candidates by it, ``deepseek-moe merge MODEL OUTPUT --toward NEW`` one. One tensor
after another is read and written, so that neither model is ever whole in memory. A weight is computed in fp32 and
rounded once to its own type; alpha 0 and 1 give the inputs' bytes. By name, not by this formula: whole numbers, the
balancing bias and the state of the expert share, which belong to a routing as a whole. They are the nearer model's, at
alpha 0.5 the new one's.

Reference:
    Wortsman et al. 2022, arXiv 2109.01903 (WiSE-FT: interpolation between a model and its fine-tuned version).
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from deepseek_records.hashes import hash_tokenizer
from deepseek_records.json_files import read_object
from deepseek_records.loading import is_adapter, load_tokenizer, resolve_checkpoint
from deepseek_records.output_paths import make_output
from modeling_deepseek.checkpoint_check import check_index, read_headers
from modeling_deepseek.families import BIAS_NAMES

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# Settings of who wrote the file and of training; what the model computes does not depend on them.
_FREE_KEYS = (
    *("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "output_router_logits"),
    *("router_bias_update_speed", "seq_aux_loss_coef", "router_z_loss_coef", "router_aux_loss_coef", "mtp_loss_coef"),
    *("hidden_dropout", "attention_dropout"),
)
_WHOLE_NAMES = (*BIAS_NAMES, "share.state")
_FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def merge_weights(old: str | Path, new: str | Path, output: str | Path, alpha: float) -> Path:
    """Write the checkpoint that lies `alpha` of the way from one to another, and return its folder.

    Configuration, tokenizer and all else but weights are the new one's, which must be equal in both.

    Args:
        old: A checkpoint in safetensors, or a run folder.
        new: Another of the same model.
        output: The folder to write, absent or empty; it appears whole, by a rename.
        alpha: In [0, 1].

    Raises:
        FileExistsError: The output holds something.
        FileNotFoundError: There is no checkpoint, or not in safetensors.
        ValueError: They are two models: settings, tokenizers or tensors differ, or weights are quantized.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: got {alpha!r}, expected a number in [0, 1]")
    output = Path(output)
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"output: got {output}, expected an empty or absent folder")
    sources = [_checkpoint(one) for one in (old, new)]
    _check_same_model(*sources)
    places = [_tensor_files(source) for source in sources]
    _check_same_tensors(*places)
    make_output(output.parent)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    weights = set(places[1].values()) | {sources[1] / _INDEX}
    partial.mkdir()
    for path in sorted(sources[1].iterdir()):
        if path.is_file() and path not in weights and path.suffix not in (".bin", ".pt", ".pth"):
            shutil.copyfile(path, partial / path.name)
    # The files of the model whose bytes are to come out at 0 or 1; their headers say where each tensor lies.
    layout = 0 if alpha == 0 else 1
    if (sources[layout] / _INDEX).is_file():
        shutil.copyfile(sources[layout] / _INDEX, partial / _INDEX)
    for file in sorted(set(places[layout].values())):
        shutil.copyfile(file, partial / file.name)
        if 0 < alpha < 1:
            _fill(partial / file.name, places, alpha)
    if output.exists():
        output.rmdir()
    partial.rename(output)
    return output


def merge_tensors(name: str, old: torch.Tensor, new: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return the tensor between two, in their type.

    Args:
        name: In the checkpoint; says what is not interpolated.
        old: At alpha 0.
        new: At alpha 1.
        alpha: In [0, 1].
    """
    if not old.is_floating_point() or name.endswith(_WHOLE_NAMES):
        return new if alpha >= 0.5 else old
    if old.dtype == torch.float64:
        return torch.lerp(old, new, alpha)
    return torch.lerp(old.float(), new.float(), alpha).to(old.dtype)


def check_plain(source: Path) -> None:
    """Refuse a checkpoint that cannot be interpolated.

    Args:
        source: Its folder.

    Raises:
        FileNotFoundError: It is not in safetensors.
        ValueError: Its weights are quantized.
    """
    if read_object(source / "config.json", "model").get("quantization_config"):
        raise ValueError(f"model: got {source} with quantized weights, expected fp32, bf16 or fp16")
    _tensor_files(source)


def _checkpoint(name: str | Path) -> Path:
    source = resolve_checkpoint(name)
    if is_adapter(source):
        raise ValueError(f"model: got the adapter {source}, expected whole weights; run deepseek-moe merge first")
    if not Path(source).is_dir():
        raise FileNotFoundError(f"model: got {source}, expected a local checkpoint folder")
    check_index(source)
    return Path(source)


def _check_same_model(old: Path, new: Path) -> None:
    settings = [read_object(path / "config.json", "model") for path in (old, new)]
    keys = [key for key in sorted({*settings[0], *settings[1]}) if key not in _FREE_KEYS]
    changed = [key for key in keys if settings[0].get(key) != settings[1].get(key)]
    if changed:
        raise ValueError(f"model: got {old} and {new}, which differ in {', '.join(changed[:5])}, expected one model")
    check_plain(old)
    if hash_tokenizer(load_tokenizer(old)) != hash_tokenizer(load_tokenizer(new)):
        raise ValueError(
            f"tokenizer: got different ones in {old} and {new}, expected one; equal ids must mean equal text"
        )


def _tensor_files(source: Path) -> dict[str, Path]:
    """The file of each tensor."""
    if (source / _INDEX).is_file():
        index = read_object(source / _INDEX, "model")
        return {name: source / file for name, file in index["weight_map"].items()}
    if not (source / _SINGLE).is_file():
        raise FileNotFoundError(f"model: {source} holds no {_SINGLE}, expected weights in safetensors")
    return dict.fromkeys(read_headers([source / _SINGLE]), source / _SINGLE)


def _check_same_tensors(old: dict[str, Path], new: dict[str, Path]) -> None:
    if old.keys() != new.keys():
        one = sorted(old.keys() ^ new.keys())[0]
        raise ValueError(f"model: got {one} in one checkpoint only, expected the same tensors in both")
    headers = [read_headers(sorted(set(files.values()))) for files in (old, new)]
    for name in old:
        first, second = (header[name] for header in headers)
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            raise ValueError(
                f"model: {name}: got {first.dtype} {first.shape} and {second.dtype} {second.shape}, expected equals"
            )


def _fill(path: Path, places: list[dict[str, Path]], alpha: float) -> None:
    """Replace each tensor of a file by the one between the two models', where its header says that it lies."""
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    content = np.memmap(path, dtype=np.uint8, mode="r+")
    for name, place in header.items():
        old, new = (_read_tensor(files[name], name) for files in places)
        if old.is_floating_point() and old.dtype not in _FLOATS:
            raise ValueError(f"model: {name}: got {old.dtype}, expected fp32, bf16 or fp16")
        merged = merge_tensors(name, old, new, alpha).contiguous()
        begin, end = (start + offset for offset in place["data_offsets"])
        content[begin:end] = merged.reshape(-1).view(torch.uint8).numpy()
    content.flush()


def _read_tensor(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor
