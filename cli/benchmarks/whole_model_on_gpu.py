"""Whole models on one GPU: fine-tuning by the recipe of docs/finetune_any_moe.md, a forward pass and greedy decoding.

    python -m deepseek_cli.benchmarks.whole_model_on_gpu --output FOLDER

transformers' own classes with drawn weights, made on the device, which random text runs through: for each model of
``finetune_count.py``

    4-bit      experts in NF4: LoRA of rank 8 on attention's output and experts, gradient checkpointing, AdamW, one
               sequence of 2,048 tokens per step; the peak of memory stands beside the counted sum
    bf16       the same with bf16 experts by `fused_moe`, and by transformers' ``grouped_mm`` under stock PEFT, which
               adds the adapter to a copy of the weights
    forward    2,048 tokens without gradients by both
    decode     16 greedy steps after 128 tokens by both and, as it is meant for few tokens, by ``batched_mm``

Implementations take turns; the first loss of both trainings and the logits of both are compared. What does not fit is
reported so. Before anything is timed, processes of their own run each kind on two layers, into Triton's cache. Writes
``whole_model_on_gpu.json`` after every row; no row begins after ``--seconds``. ``--tiny`` runs small models, on a CPU
too.

T tokens, E experts.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from deepseek_cli.benchmarks.compile_ahead import compile_in_processes
from deepseek_cli.benchmarks.drawn_models import adapted, build, changed, set_implementation, tiny
from deepseek_cli.benchmarks.finetune_count import GIB, count, released_models
from deepseek_cli.benchmarks.kernel_timing import synchronize

FILE = "whole_model_on_gpu.json"
FUSED, STOCK = "fused_moe", "grouped_mm"
DECODERS = (FUSED, STOCK, "batched_mm")
KINDS = ("4-bit", "bf16")
TOKENS, PROMPT, STEPS = 2048, 128, 16
_COMPILED_VOCABULARY = 4096


class Measurement:
    """Rows of one run: measured within a time, written as soon as they are there.

    Args:
        path: The file.
        device: ``cuda`` or ``cpu``.
        seconds: After which no row begins.
        per_row: How long to time each row, about.
    """

    def __init__(self, path: Path, device: str, seconds: float, per_row: float) -> None:
        self.path, self.device, self.per_row = path, device, per_row
        self.end = time.monotonic() + seconds
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        self.result: dict[str, Any] = {"device": name, "torch": torch.__version__, "rows": []}

    def add(self, row: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Measure, keep, print and write a row, one that does not fit or has no time too; return it.

        Args:
            row: What tells it from others.
            measure: Returns its figures.
        """
        begun = time.monotonic()
        if begun > self.end:
            row["left_out"] = "no time"
        else:
            self._release()
            try:
                row |= measure()
            except torch.OutOfMemoryError:
                row["out_of_memory"] = True
            except Exception as error:  # whatever it is, the rows after it are measured
                row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            row["took_s"] = round(time.monotonic() - begun, 1)
        self.result["rows"].append(row)
        print(json.dumps(row), flush=True)
        self.write()
        return row

    def write(self) -> None:
        """Write what there is."""
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(self.result, indent=1), encoding="utf-8")
        unfinished.replace(self.path)

    def _release(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> dict[str, float]:
        """Return the most memory taken since the row began, and what the allocator held for it; nothing on a CPU."""
        if self.device != "cuda":
            return {}
        peaks = {"peak_gib": torch.cuda.max_memory_allocated(), "reserved_gib": torch.cuda.max_memory_reserved()}
        return {name: peak / GIB for name, peak in peaks.items()}

    def times(self, step: Callable[[], object], *, warm_ups: int = 1, fewest: int = 3) -> list[float]:
        """Return the seconds of each step, of as many as there is time for.

        Args:
            step: What to time.
            warm_ups: Steps before.
            fewest: At least so many.
        """
        for _ in range(warm_ups):
            step()
        synchronize(self.device)
        found: list[float] = []
        while len(found) < fewest or sum(found) < self.per_row:
            begun = time.perf_counter()
            step()
            synchronize(self.device)
            found.append(time.perf_counter() - begun)
        return found


def _rate(tokens: int, seconds: list[float]) -> dict[str, Any]:
    """Tokens per second of the median, its standard error and how many there were."""
    middle, spread = statistics.median(seconds), statistics.stdev(seconds) if len(seconds) > 1 else 0.0
    stderr = 1.2533 * spread / len(seconds) ** 0.5
    figures = {"seconds": middle, "seconds_stderr": stderr, "num_steps": len(seconds)}
    return {**figures, "tokens_per_second": tokens / middle}


def measure_training(run: Measurement, model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """Return the first loss, tokens per second and the peak of memory of the recipe's steps.

    Args:
        run: With the clock.
        model: From `adapted`; its adapter is as it was before afterwards.
        ids: [1, T].
    """
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [leaf.detach().to("cpu", copy=True) for leaf in leaves]
    optimizer = torch.optim.AdamW(leaves, lr=1e-4, fused=run.device == "cuda")
    losses: list[Tensor] = []

    def step() -> None:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    try:
        seconds = run.times(step)
        figures = {"loss": losses[0].item(), "last_loss": losses[-1].item()}
        return figures | _rate(ids.numel(), seconds) | run.peak_gib()
    finally:
        optimizer.zero_grad()
        with torch.no_grad():
            for leaf, value in zip(leaves, before, strict=True):
                leaf.copy_(value)


@torch.no_grad()
def measure_forward(run: Measurement, model: nn.Module, ids: Tensor, wanted: Tensor | None) -> dict[str, Any]:
    """Return tokens per second and the peak of a forward pass, and how far its logits are from others.

    Args:
        run: With the clock.
        model: From `build`.
        ids: [1, T].
        wanted: The other implementation's logits of the last 64 tokens.
    """
    figures = _rate(ids.numel(), run.times(lambda: model(input_ids=ids, use_cache=False))) | run.peak_gib()
    if wanted is not None:
        got = _last_logits(model, ids)
        figures["logits_error"] = ((got - wanted).norm() / wanted.norm()).item()
        figures["same_choice"] = (got.argmax(-1) == wanted.argmax(-1)).float().mean().item()
    return figures


@torch.no_grad()
def _last_logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits[0, -64:].float()


@torch.no_grad()
def measure_decoding(run: Measurement, model: nn.Module, prompt: Tensor) -> dict[str, Any]:
    """Return tokens per second of greedy steps of one sequence, the prompt left out.

    Args:
        run: With the clock.
        model: From `build`.
        prompt: [1, T].
    """

    def steps() -> float:
        output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        synchronize(run.device)
        begun = time.perf_counter()
        for _ in range(STEPS):
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        synchronize(run.device)
        return time.perf_counter() - begun

    steps()
    return _rate(STEPS, [steps() for _ in range(3)])


def measure_model(run: Measurement, name: str, config: PreTrainedConfig, kind: str, num_tokens: int) -> None:
    """Add the rows of one model and kind.

    Args:
        run: The rows.
        name: Of the model.
        config: Of the model.
        kind: Of `KINDS`.
        num_tokens: T of training and forward pass.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, num_tokens), generator=generator).to(run.device)
    model: list[nn.Module] = []

    def make() -> dict[str, Any]:
        model.append(build(config, kind, run.device))
        size = torch.cuda.memory_allocated() / GIB if run.device == "cuda" else 0.0
        return {"weights_gib": size} if size else {}

    def row(what: str, implementation: str) -> dict[str, Any]:
        return {"model": name, "kind": kind, "what": what, "implementation": implementation, "T": num_tokens}

    run.add(row("build", FUSED), make)
    if not model:
        return
    if kind == "bf16":
        _add_inference(run, model[0], ids, row)
    model[0] = adapted(model[0])
    for implementation in (FUSED,) if kind == "4-bit" else (FUSED, STOCK):
        set_implementation(model[0], implementation)
        run.add(row("train", implementation), lambda: measure_training(run, model[0], ids))


def _add_inference(run: Measurement, model: nn.Module, ids: Tensor, row: Callable[[str, str], dict[str, Any]]) -> None:
    """The rows of forward pass and decoding."""
    set_implementation(model, STOCK)
    wanted: list[Tensor | None] = [None]

    def stock() -> dict[str, Any]:
        figures = measure_forward(run, model, ids, None)
        wanted[0] = _last_logits(model, ids)
        return figures

    run.add(row("forward", STOCK), stock)
    set_implementation(model, FUSED)
    run.add(row("forward", FUSED), lambda: measure_forward(run, model, ids, wanted[0]))
    for implementation in DECODERS:
        set_implementation(model, implementation)
        run.add(row("decode", implementation), lambda: measure_decoding(run, model, ids[:, :PROMPT]))


def compile_ahead(models: dict[str, PreTrainedConfig], num_tokens: int) -> None:
    """Run every kind once on two layers with a small vocabulary, by a process each.

    Args:
        models: By name.
        num_tokens: T.
    """
    shapes = {_experts_of(config): config for config in models.values()}
    jobs = [(config, kind, num_tokens) for config in shapes.values() for kind in ("4-bit", "bf16", "inference")]
    compile_in_processes([(_compile, job) for job in jobs])


def _experts_of(config: PreTrainedConfig) -> tuple[int, ...]:
    """Sizes that tell kernels apart: two models of the same need compiling once."""
    num_experts = config.n_routed_experts if "n_routed_experts" in vars(config) else config.num_experts
    return config.hidden_size, config.moe_intermediate_size, num_experts, config.num_experts_per_tok


def _compile(config: PreTrainedConfig, kind: str, num_tokens: int) -> None:
    small = changed(config, num_hidden_layers=2, vocab_size=min(config.vocab_size, _COMPILED_VOCABULARY))
    model = build(small, "bf16" if kind == "inference" else kind, "cuda")
    ids = torch.zeros(1, num_tokens, dtype=torch.int64, device="cuda").random_(0, small.vocab_size)
    if kind != "inference":
        adapted(model)(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return
    with torch.no_grad():
        for length in (num_tokens, PROMPT, 1):
            model(input_ids=ids[:, :length], use_cache=False)


def table(result: dict[str, Any]) -> str:
    """Return the rows as a table in Markdown.

    Args:
        result: As written.
    """
    lines = [
        "| model | experts | what | by | tokens per second | peak GiB | counted GiB | first loss, or logits off |"
    ]
    lines.append("| " + " | ".join(["---"] * 8) + " |")
    for row in result["rows"]:
        if row["what"] == "build":
            continue
        speed = "out of memory" if "out_of_memory" in row else row.get("failed", row.get("left_out", ""))
        if "tokens_per_second" in row:
            stderr = row["tokens_per_second"] * row["seconds_stderr"] / row["seconds"]
            speed = f"{row['tokens_per_second']:.1f} ± {stderr:.1f}"
        counted = result["counted_gib"][row["model"]] if row["kind"] == "4-bit" else None
        memory = " | ".join("" if gib is None else f"{gib:.2f}" for gib in (row.get("peak_gib"), counted))
        extra = f"{row['loss']:.4f}" if "loss" in row else ""
        extra = f"{row['logits_error']:.1e}" if "logits_error" in row else extra
        titles = " | ".join(row[key] for key in ("model", "kind", "what", "implementation"))
        lines.append(f"| {titles} | {speed} | {memory} | {extra} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Compile, measure and write.

    Args:
        arguments: Of the command line; None for the process's own.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("."))
    parser.add_argument("--seconds", type=float, default=150, help="no row begins later")
    parser.add_argument("--per-row", type=float, default=2.5, help="how long to time each row, about")
    parser.add_argument("--tiny", action="store_true", help="small models, also on a CPU")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        parser.error("--tiny: got a machine without a GPU and no --tiny, expected --tiny there")
    models = {name: tiny(config) if args.tiny else config for name, config in released_models().items()}
    num_tokens = 40 if args.tiny else TOKENS
    args.output.mkdir(parents=True, exist_ok=True)
    run = Measurement(args.output / FILE, device, args.seconds, args.per_row)
    run.result["counted_gib"] = {name: sum(count(config, name)[1]) / GIB for name, config in models.items()}
    if device == "cuda":
        compile_ahead(models, num_tokens)
    # What every model has to say first; the two largest in bf16 last.
    for kind in KINDS:
        for name, config in models.items():
            measure_model(run, name, config, kind, num_tokens)
    print(table(run.result))


if __name__ == "__main__":
    main()
