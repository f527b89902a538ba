"""The start-up block of a stage, which ``--dry-run`` prints and stops after.

Each stage calls `announce` with what it has built: the model, its data, its settings. All is counted except memory,
which is a formula, and time, which is measured over a step on this machine (`step_time`).
"""

import dataclasses
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from deepseek_records.loading import load_model, resolve_checkpoint
from deepseek_training.launch.cluster.devices import DEVICES
from deepseek_training.launch.step_time import MOST_BYTES, random_batch, time_passes, timed_rows
from deepseek_training.launch.training_memory import estimate_training
from deepseek_training.recipes.dpo import DpoRecipe
from deepseek_training.trainer.checkpoints import is_complete, step_of
from modeling_deepseek.families import find_moe_layers

_ADAMW_BYTES = 16  # of a trained parameter: weight, gradient and two moments in fp32


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a stage is about to do.

    Attributes:
        command: The stage.
        rows: Label and text.
    """

    command: str
    rows: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return "\n".join(f"  {label:<13}{text}" for label, text in self.rows)


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """How large a model is.

    Attributes:
        total: Parameters.
        active: Of these, the most that one token uses.
        trained: Of these, what the training moves.
        num_bytes: Bytes of the weights as they lie in memory.
    """

    total: int
    active: int
    trained: int
    num_bytes: int


def measure_size(model: torch.nn.Module) -> ModelSize:
    """Count a model's parameters; routed experts are active in the share that the configuration chooses of them.

    Args:
        model: Any, also one on the meta device or wrapped by PEFT.
    """
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    total = sum(parameter.numel() for parameter in parameters.values())
    routed = sum(_routed_rest(layer, model) for layer in find_moe_layers(model))
    return ModelSize(
        total=total,
        active=round(total - routed),
        trained=sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad),
        num_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters.values()),
    )


def _routed_rest(layer: Any, model: torch.nn.Module) -> float:
    """The parameters of a layer's routed experts that a token does not use."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    chosen = getattr(config, "num_experts_per_tok", None)
    if layer.experts is None or not layer.num_experts or not isinstance(chosen, int):
        return 0.0
    return sum(parameter.numel() for parameter in layer.experts.parameters()) * (1 - chosen / layer.num_experts)


def plan_training(
    command: str,
    recipe: Any,
    args: TrainingArguments,
    model: PreTrainedModel,
    *,
    data: Sequence[tuple[str, int, int]],
    num_blocks: int = 0,
    blocks: Sequence[Any] = (),
    num_trained: int | None = None,
) -> Plan:
    """Return the plan of `pretrain`, `adapt` or `sft`.

    Args:
        command: The stage.
        recipe: Its settings.
        args: The trainer's arguments.
        model: What will be trained, also on the meta device.
        data: Name, documents to train on and held-out documents of each data set.
        num_blocks: Blocks or conversations to train on.
        blocks: In its place the blocks of each data set.
        num_trained: Parameters that the training moves, where it does not move all of each that requires a gradient.
    """
    num_blocks = num_blocks or sum(map(len, blocks))
    wasted = [one.waste for one in blocks if hasattr(one, "waste")]
    size = measure_size(model)
    size = size if num_trained is None else dataclasses.replace(size, trained=num_trained)
    per_step = recipe.batch_size * recipe.gradient_accumulation_steps * args.world_size
    passes = recipe.max_steps * per_step / max(1, num_blocks)
    memory = estimate_training(
        model,
        recipe.batch_size * recipe.sequence_length,
        trained=size.trained,
        is_bf16=recipe.bf16,
        is_checkpointed=recipe.gradient_checkpointing,
        is_accumulated=recipe.gradient_accumulation_steps > 1,
    ).total
    tokens = per_step * recipe.sequence_length
    seconds = _time_step(recipe, args, model) if memory < free_bytes() else None
    units = {
        "sft": "conversations, at most",
        "dpo": "pairs, at most twice",
        "multimodal": "questions, at most, and text of",
    }
    unit = units.get(command, "blocks of")
    return Plan(
        command,
        (
            ("model", describe_size(size)),
            *(("data", f"{name}: {train:,} to train on, {held_out:,} held out") for name, train, held_out in data),
            (
                "blocks",
                f"{num_blocks:,} {unit} {recipe.sequence_length} tokens"
                + (f", documents apart, {max(wasted):.2%} padding" if wasted else ""),
            ),
            (
                "steps",
                f"{recipe.max_steps:,} of {per_step} x {recipe.sequence_length} = {tokens:,} tokens"
                + (f" over {args.world_size} processes" if args.world_size > 1 else "")
                + f"; {passes:.2g} passes over the data",
            ),
            ("compute", describe_compute(size, tokens * recipe.max_steps)),
            ("memory", describe_memory(memory)),
            ("time", describe_time(seconds and seconds * recipe.max_steps, "the steps; measurements come on top")),
            *switches(model, recipe, args),
        ),
    )


def describe_compute(size: ModelSize, num_tokens: float) -> str:
    """Return a training's tokens and FLOPs in words, and what these are on one H100.

    Six FLOPs per active parameter and token, four where most parameters are frozen; attention over the context is left
    out. The share of the peak is an assumption; `deepseek-moe plan` estimates it for a layout.

    Args:
        size: The model's.
        num_tokens: Trained on in all.
    """
    per_parameter = 6 if size.trained > size.total / 2 else 4
    flops = per_parameter * size.active * num_tokens
    hours = flops / (0.4 * DEVICES["h100"].bf16_flops) / 3600
    text = f"{_short(num_tokens)} tokens, about {flops:.2g} FLOPs"
    return (
        text if hours < 0.1 else f"{text}: {hours:,.{0 if hours >= 10 else 1}f} h on one H100 at 40% of its bf16 peak"
    )


def training_bytes(size: ModelSize, model: PreTrainedModel, num_tokens: int) -> float:
    """Return about how many bytes a training needs on one device that holds all of it.

    Weights, gradients and AdamW's moments in fp32, and for each token of a pass the activations of every layer (about
    20 values of the hidden width) and the logits three times over.

    Args:
        size: The model's.
        model: For its widths.
        num_tokens: Tokens of one forward pass.
    """
    config = model.config.get_text_config()
    per_token = 20 * config.num_hidden_layers * config.hidden_size + 3 * config.vocab_size
    return size.num_bytes + (_ADAMW_BYTES - 4) * size.trained + 4 * per_token * num_tokens


def free_bytes() -> int:
    """Return the free memory of the device that trains: the first GPU's, else the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _cached_bytes()


def _cached_bytes() -> int:
    """What the operating system keeps of files and would give back."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Cached:", "Buffers:")))


def _time_step(recipe: Any, args: TrainingArguments, model: PreTrainedModel) -> float | None:
    if args.world_size > 1:
        return None
    rows = timed_rows(recipe.batch_size, recipe.sequence_length, args.device)
    batch = random_batch(model, rows, recipe.sequence_length)
    passes = recipe.gradient_accumulation_steps * recipe.batch_size / rows
    if isinstance(recipe, DpoRecipe):  # two answers each, and the reference's forward passes, a third of the whole
        passes *= 8 / 3
    return time_passes(model, batch, num_passes=passes, device=args.device, is_bf16=recipe.bf16)


def load_or_outline(name: str, *, is_dry: bool, **options: Any) -> PreTrainedModel:
    """Return the model of a checkpoint; for a dry run of one over 1 GiB, which is not timed, only its shapes.

    Args:
        name: As for `load_model`.
        is_dry: Whether nothing but the plan is wanted.
        **options: As for `load_model`.
    """
    source = Path(resolve_checkpoint(name))
    num_bytes = sum(file.stat().st_size for file in source.glob("*.safetensors")) if source.is_dir() else 0
    if not is_dry or num_bytes < MOST_BYTES:
        return load_model(name, **options)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))


def describe_size(size: ModelSize) -> str:
    """Return a model's size in words."""
    text = f"{_short(size.total)} parameters"
    if size.active < size.total:
        text += f", at most {_short(size.active)} ({size.active / size.total:.0%}) active per token"
    if size.trained < size.total:
        text += f", {_short(size.trained)} ({size.trained / size.total:.2%}) trained"
    return text


def _short(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.0f}"


def describe_memory(num_bytes: float) -> str:
    """Return the estimate of the memory beside what is free."""
    free, needed = free_bytes() / 2**30, num_bytes / 2**30
    text = f"about {needed:.2g} GiB of {free:.3g} GiB free" if needed < 100 else f"about {needed:.0f} GiB"
    return text if needed < free else f"{text}: more than this machine has on one device ({free:.3g} GiB free)"


def describe_time(seconds: float | None, what: str) -> str:
    """Return the estimate of the time, None for none."""
    if seconds is None:
        return "not estimated; the progress bar tells it from the first steps on"
    if seconds < 90:
        text = f"{seconds:.0f} s"
    elif seconds < 5400:
        text = f"{seconds / 60:.0f} min"
    else:
        text = f"{seconds / 3600:.1f} h"
    return f"about {text} for {what} (timed on this machine)"


def switches(model: PreTrainedModel, recipe: Any, args: TrainingArguments) -> tuple[tuple[str, str], ...]:
    """Return what is on and what is off, each in one row."""
    config = model.config.get_text_config()

    def read(name: str) -> Any:
        return getattr(recipe, name, None) if hasattr(recipe, name) else getattr(config, name, None)

    speed = read("bias_update_speed")
    speed = getattr(config, "router_bias_update_speed", None) if speed is None else speed
    states: dict[str, Any] = {
        "balancing bias": speed,
        "sequence loss": read("seq_aux_loss_coef"),
        "z-loss": read("router_z_loss_coef"),
        "multi-token prediction": getattr(config, "num_nextn_predict_layers", 0) and read("mtp_loss_coef"),
        "dropout": read("hidden_dropout"),
        "LoRA": read("lora_rank"),
        "bf16": read("bf16"),
        "gradient checkpointing": read("gradient_checkpointing"),
        "evaluation steps": read("eval_steps"),
        "checkpoint steps": read("save_steps"),
        "trackers": ", ".join(args.report_to or []),
        "experts": read("experts_implementation"),
    }
    return ("on", _join(states, is_on=True)), ("off", _join(states, is_on=False))


def _join(states: dict[str, Any], *, is_on: bool) -> str:
    chosen = {name: value for name, value in states.items() if bool(value) is is_on}
    shown: Iterable[str] = (
        name if value is True or not is_on else f"{name} {value}" for name, value in chosen.items()
    )
    return ", ".join(shown) or "nothing"


def describe_start(output: Path) -> str:
    """Return whether a run begins or goes on."""
    whole = [folder for folder in output.glob("checkpoints/checkpoint-*") if is_complete(folder)]
    checkpoint = max(whole, key=step_of, default=None)
    return f"{output}, goes on from step {step_of(checkpoint)}" if checkpoint else f"{output}, from the start"


def announce(plan: Plan, output: Path, *, is_first: bool, is_dry: bool) -> None:
    """Print the block, in the first process only.

    Args:
        plan: What the stage is about to do.
        output: The run folder.
        is_first: Whether this is the first process.
        is_dry: Whether it stops after that.
    """
    if not is_first:
        return
    # With the progress bar and the warnings; a dry run has nothing else to say.
    file = sys.stdout if is_dry else sys.stderr
    print(f"{plan.command}: {describe_start(output)}\n{plan}", file=file, flush=True)
    if is_dry:
        print("dry run: nothing was written", flush=True)
