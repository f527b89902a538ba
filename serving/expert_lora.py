"""``export --to expert_lora``: an adapter of fused experts under the names of the base model's own checkpoint.

Engines that load the original checkpoint find experts one by one there, so the adapter has to name them one by one.
The base model is built on the meta device, from its configuration alone: no weights are read.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from deepseek_records.json_files import read_object
from deepseek_records.loading import base_of_adapter, first_line, is_adapter, resolve_checkpoint
from deepseek_serving.checkpoint_names import CheckpointNames, read_names
from deepseek_serving.expert_adapter import CONFIG, PREFIX, WEIGHTS, split_experts

_PAIR = re.compile(r"^(?P<path>.+?)\.lora_(?P<part>[AB])\.weight$")


def export_expert_lora(adapter: str | Path, output: str | Path, base: str | None = None) -> Path:
    """Write an adapter of fused experts as two-dimensional LoRA of the single experts of its base's checkpoint.

    Args:
        adapter: A folder as PEFT writes it, with both projections of the experts adapted.
        output: The folder to write, empty or absent.
        base: The base model, where it lies elsewhere than the adapter says.

    Raises:
        FileNotFoundError: There is no adapter or no base model.
        FileExistsError: The output holds something.
        ValueError: The adapter belongs to another model, or is none that can be split.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"output: got {output}, expected an empty or absent folder")
    source = resolve_checkpoint(adapter)
    if not is_adapter(source):
        raise FileNotFoundError(f"adapter: got {adapter}, expected a folder with {CONFIG} and no model")
    settings = read_object(Path(source, CONFIG), "adapter")
    _check_settings(settings)
    name = base_of_adapter(source) if base is None else resolve_checkpoint(base)
    names = read_names(build_without_weights(name))
    _check_fit(Path(source), settings, names, name)
    written = split_experts(source, output, names)
    if base is None:
        return written
    config = json.loads((written / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = name
    (written / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return written


def build_without_weights(base: str) -> PreTrainedModel:
    """Return a model on the meta device.

    Args:
        base: A checkpoint's folder or a Hub id.

    Raises:
        ValueError: Its configuration is absent or refused.
    """
    try:
        config = AutoConfig.from_pretrained(base)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise ValueError(f"base: got {base}, which has no configuration that loads ({first_line(error)})") from None


def _check_settings(settings: dict[str, Any]) -> None:
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"peft_type: got {settings.get('peft_type')}, expected LORA")
    rank = settings.get("r")
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"r: got {rank}, expected a rank of at least 1")
    if settings.get("use_dora"):
        raise ValueError("use_dora: got true, expected plain LoRA")


def _check_fit(source: Path, settings: dict[str, Any], names: CheckpointNames, base: str) -> None:
    """Hold the shape of every factor against the base model's weights."""
    try:
        with safe_open(source / WEIGHTS, "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise FileNotFoundError(f"adapter: got {source}, expected {WEIGHTS} in it") from None
    except SafetensorError as error:
        raise ValueError(f"adapter: the weights in {source} are damaged or cut short ({first_line(error)})") from None
    named = settings.get("base_model_name_or_path")
    for key, shape in shapes.items():
        match = _PAIR.match(key.removeprefix(PREFIX))
        if match is None:
            continue
        path, rank = match["path"], settings["r"]
        if path.removesuffix(".base_layer").endswith(".experts"):
            expected = _expert_shapes(path.removesuffix(".base_layer"), match["part"], rank, names)
        else:
            weights = [names.shapes[path]] if path in names.shapes else []
            expected = [(rank, weight[1]) if match["part"] == "A" else (weight[0], rank) for weight in weights]
        if not expected:
            raise ValueError(f"adapter: got {path}, which {base} does not have; the adapter names {named} as its base")
        if shape not in expected:
            raise ValueError(
                f"adapter: got {shape} for {path}'s {match['part']}, expected {expected[0]} at rank {rank} for "
                f"{base}; the adapter names {named} as its base"
            )


def _expert_shapes(block: str, part: str, rank: int, names: CheckpointNames) -> list[tuple[int, ...]]:
    """What A or B of either projection may be; PEFT nests the two in the order of their targets."""
    weights = [names.shapes[key] for key in (f"{block}.gate_up_proj", f"{block}.down_proj") if key in names.shapes]
    if part == "A":
        return [(count * rank, inputs) for count, _, inputs in weights]
    return [(outputs, count * rank) for count, outputs, _ in weights]
