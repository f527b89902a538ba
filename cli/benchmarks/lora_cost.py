"""What LoRA on experts costs: adapters inside `fused_moe` against frozen experts, full training and PEFT's fold.

``deepseek-moe bench lora`` times forward and backward of one DeepSeek-V3 of 27 M parameters, most of them in 128
experts per layer, in turn within one run: with an adapter on attention alone (``frozen``), on attention and experts
(``lora``), the same by PEFT's merged copy (``fold``), and with every weight trained (``full``). Kept is what autograd
holds between the two passes, parameters left out.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import modeling_deepseek.expert_adapters as expert_adapters
from deepseek_cli.benchmarks.result_files import BenchmarkRun
from deepseek_cli.benchmarks.step_cost import Shape

SHAPE = Shape(128, 8, 256, 128, batch_size=1, sequence_length=128)
BATCHES = {128: (1, 128), 1024: (4, 256)}
KINDS = ("frozen", "lora", "fold", "full")
ATTENTION = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
WARM_UP_ROUNDS = 2
FOLD_ROUNDS = 3  # It is several times slower; its exact time matters little.


def build(kind: str, rank: int) -> nn.Module:
    """Return the model of one kind, ready to train.

    Args:
        kind: One of `KINDS`.
        rank: Of the adapters.
    """
    torch.manual_seed(0)
    settings = {**SHAPE.settings(), "num_hidden_layers": 3}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**settings, experts_implementation="fused_moe"))
    if kind != "full":
        targets = None if kind == "frozen" else EXPERTS
        adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ATTENTION, target_parameters=targets)
        model = get_peft_model(model, adapter)
    return model.train()


@contextmanager
def folding(is_on: bool) -> Iterator[None]:
    """Have PEFT fold the adapters, as it does without this package.

    Args:
        is_on: Whether to.
    """
    runs_fused = expert_adapters.runs_fused
    if is_on:
        expert_adapters.runs_fused = lambda experts: False
    try:
        yield
    finally:
        expert_adapters.runs_fused = runs_fused


def step(model: nn.Module, input_ids: Tensor) -> None:
    """Run forward and backward and drop the gradients.

    Args:
        model: To train.
        input_ids: `[B, S]`, also the labels.
    """
    model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


def kept_bytes(model: nn.Module, input_ids: Tensor) -> int:
    """Return the bytes that one forward pass leaves for the backward pass.

    Args:
        model: To train.
        input_ids: `[B, S]`.
    """
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
    assert loss.requires_grad
    return sum(kept.values())


def measure(models: dict[str, nn.Module], num_tokens: int, num_rounds: int) -> dict[str, Any]:
    """Return median seconds and kept bytes of each kind at one number of tokens.

    Args:
        models: By kind.
        num_tokens: One of `BATCHES`.
        num_rounds: Timed steps of each.
    """
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, 2048, BATCHES[num_tokens], generator=generator)
    seconds: dict[str, list[float]] = {kind: [] for kind in models}
    kinds = list(models)
    for turn in range(WARM_UP_ROUNDS + num_rounds):
        for kind in kinds[turn % len(kinds) :] + kinds[: turn % len(kinds)]:
            if kind == "fold" and turn >= WARM_UP_ROUNDS + FOLD_ROUNDS:
                continue
            with folding(kind == "fold"):
                began = time.perf_counter()
                step(models[kind], input_ids)
            if turn >= WARM_UP_ROUNDS:
                seconds[kind].append(time.perf_counter() - began)
    kept = {}
    for kind, model in models.items():
        with folding(kind == "fold"):
            kept[kind] = kept_bytes(model, input_ids)
    return {"seconds": {kind: statistics.median(row) for kind, row in seconds.items()}, "kept_bytes": kept}


def format_row(num_tokens: int, figures: dict[str, Any]) -> str:
    """Return one row of the table.

    Args:
        num_tokens: T.
        figures: From `measure`.
    """
    seconds, kept = figures["seconds"], figures["kept_bytes"]
    times = " | ".join(f"{1e3 * seconds[kind]:.0f}" for kind in KINDS)
    ratios = " | ".join(f"{seconds['lora'] / seconds[kind]:.2f}" for kind in ("frozen", "full", "fold"))
    extra = " | ".join(f"{(kept[kind] - kept['frozen']) / 2**20:.1f}" for kind in ("lora", "fold"))
    return f"| {num_tokens} | {times} | {ratios} | {extra} |"


def run(args: argparse.Namespace) -> int:
    """Print the table and write all figures as JSON.

    Args:
        args: The options of ``deepseek-moe bench lora``.

    Raises:
        ValueError: The rounds, rank or threads are out of range.
    """
    for name in ("rounds", "rank", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    settings = {"rounds": args.rounds, "rank": args.rank, "num_threads": torch.get_num_threads()}
    bench = BenchmarkRun("lora", args.output, settings, overwrite=args.overwrite)
    models = {kind: build(kind, args.rank) for kind in KINDS}
    lines = [
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, "
        f"{sum(p.numel() for p in models['full'].parameters()) / 1e6:.1f} M parameters, rank {args.rank}",
        "| tokens | frozen, ms | lora, ms | fold, ms | full, ms | lora / frozen | lora / full | lora / fold | "
        "kept beyond frozen, MiB: lora | fold |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines))
    figures = {}
    for num_tokens in BATCHES:
        figures[str(num_tokens)] = measure(models, num_tokens, args.rounds)
        lines.append(format_row(num_tokens, figures[str(num_tokens)]))
        print(lines[-1], flush=True)
    bench.finish(figures, "\n".join(lines))
    return 0
