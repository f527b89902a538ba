"""What balancing costs: a training step of our model against stock transformers' DeepSeek-V3 at the same shape.

``deepseek-moe bench step`` times forward, backward and AdamW, ours with everything on (bias update,
sequence-wise balance loss, z-loss, and once more with multi-token prediction), stock's with each of its experts
implementations, in turn within one run. Stock's best implementation is not the same at every shape, so
all are tried, and one that is far behind is dropped after its first steps.
"""

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from deepseek_cli.benchmarks.result_files import BenchmarkRun
from deepseek_training.balance.callback import ExpertBalanceCallback
from deepseek_training.balance.routing_observer import has_own_losses
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM
from modeling_deepseek.families import find_moe_layers

STOCK_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
EVERYTHING = {"router_bias_update_speed": 1e-3, "seq_aux_loss_coef": 1e-4, "router_z_loss_coef": 1e-3}
MTP = {"mtp_loss_coef": 0.3, "num_nextn_predict_layers": 1}
WARM_UP_ROUNDS = 2
# An implementation this many times slower than the fastest after the warm-up cannot be the best.
FAR_BEHIND = 2.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and batch to time.

    Attributes:
        n_routed_experts: E.
        num_experts_per_tok: K.
        hidden_size: D.
        moe_intermediate_size: F.
        batch_size: B.
        sequence_length: S.
    """

    n_routed_experts: int
    num_experts_per_tok: int
    hidden_size: int
    moe_intermediate_size: int
    batch_size: int
    sequence_length: int

    def settings(self) -> dict[str, Any]:
        """Return the model's settings, DeepSeek-V3's own names only."""
        return {
            "vocab_size": 2048,
            "hidden_size": self.hidden_size,
            "intermediate_size": 3 * self.hidden_size,
            "moe_intermediate_size": self.moe_intermediate_size,
            "num_hidden_layers": 4,
            "first_k_dense_replace": 1,
            "num_attention_heads": self.hidden_size // 32,
            "num_key_value_heads": self.hidden_size // 32,
            "q_lora_rank": None,
            "kv_lora_rank": self.hidden_size // 2,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "n_routed_experts": self.n_routed_experts,
            "n_shared_experts": 1,
            "num_experts_per_tok": self.num_experts_per_tok,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "max_position_embeddings": 1024,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": True,
        }


SHAPES = {
    "32 experts": Shape(32, 4, 256, 192, 4, 256),
    "128 experts": Shape(128, 8, 256, 96, 4, 256),
}


def median_step_times(
    models: dict[str, nn.Module], input_ids: torch.Tensor, num_rounds: int, *, drop_slow: Sequence[str] = ()
) -> dict[str, float]:
    """Return the median seconds of a training step of each model: forward, backward, AdamW and bias update.

    The models step in turn, each round beginning with another, so that whatever else the machine does meets all alike.

    Args:
        models: By name; they are trained.
        input_ids: `[B, S]`, also the labels.
        num_rounds: Timed steps of each.
        drop_slow: Names that are dropped after the warm-up if they are `FAR_BEHIND` the fastest of all.
    """
    optimizers = {name: torch.optim.AdamW(model.train().parameters(), lr=1e-4) for name, model in models.items()}
    balances = {name: begin_balancing(model) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(WARM_UP_ROUNDS + num_rounds):
        if turn == WARM_UP_ROUNDS:
            fastest = min(row[-1] for row in seconds.values())
            seconds = {
                name: [] for name, row in seconds.items() if name not in drop_slow or row[-1] < FAR_BEHIND * fastest
            }
        names = list(seconds)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.perf_counter()
            train_step(models[name], optimizers[name], input_ids, balances[name])
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(row) for name, row in seconds.items()}


def begin_balancing(model: nn.Module) -> ExpertBalanceCallback | None:
    """Return what counts and balances a model's experts, already begun; None for models that are not ours."""
    if not any(has_own_losses(layer.router) for layer in find_moe_layers(model)):
        return None
    balance = ExpertBalanceCallback()
    balance.begin(model)
    return balance


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    input_ids: torch.Tensor,
    balance: ExpertBalanceCallback | None = None,
) -> float:
    """Take one optimizer step and return the loss; our routers' biases move too.

    Args:
        model: A causal language model in training mode.
        optimizer: Of its parameters.
        input_ids: `[B, S]`, also the labels.
        balance: From `begin_balancing`.
    """
    loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if balance is not None:
        balance.finish_step()
    return loss.item()


def build_models(shape: Shape) -> dict[str, nn.Module]:
    """Return stock's models and ours, all with the same weights but for ours' prediction layer.

    Args:
        shape: Their shape.
    """
    settings = shape.settings()
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {}
    for name in STOCK_IMPLEMENTATIONS:
        stock = DeepseekV3ForCausalLM(DeepseekV3Config(**settings, experts_implementation=name))
        models[f"stock {name}"] = stock
        stock.load_state_dict(models["stock eager"].state_dict())
    for name, extra in (("ours", EVERYTHING), ("ours with MTP", {**EVERYTHING, **MTP})):
        config = DeepseekConfig(
            **{"num_nextn_predict_layers": 0, **settings, **extra}, experts_implementation="fused_moe"
        )
        ours = DeepseekForCausalLM(config)
        ours.load_state_dict(stock.state_dict(), strict="MTP" not in name)
        models[name] = ours
    return models


def compare(shape: Shape, num_rounds: int) -> dict[str, Any]:
    """Return the median step times at one shape and the ratios of stock's best to ours.

    Args:
        shape: The shape.
        num_rounds: Timed steps of each model.
    """
    models = build_models(shape)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, 2048, (shape.batch_size, shape.sequence_length), generator=generator)
    medians = median_step_times(
        models, input_ids, num_rounds, drop_slow=[name for name in models if name.startswith("stock")]
    )
    best = min((name for name in medians if name.startswith("stock")), key=medians.get)
    ratios = {name: medians[best] / medians[name] for name in medians if not name.startswith("stock")}
    return {"shape": dataclasses.asdict(shape), "seconds": medians, "best_stock": best, "ratios": ratios}


def run(args: argparse.Namespace) -> int:
    """Print one line per shape and write all figures as JSON.

    Args:
        args: The options of ``deepseek-moe bench step``.

    Raises:
        ValueError: The rounds or threads are out of range.
    """
    for name in ("rounds", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    settings = {"rounds": args.rounds, "num_threads": torch.get_num_threads(), "experts": args.experts}
    bench = BenchmarkRun("step", args.output, settings, overwrite=args.overwrite)
    lines = [f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"]
    print(lines[0])
    figures = {}
    for name, shape in SHAPES.items():
        if args.experts in (None, shape.n_routed_experts):
            figures[name] = compare(shape, args.rounds)
            lines.append(f"{name}: {_describe(figures[name])}")
            print(lines[-1], flush=True)
    bench.finish(figures, "\n".join(lines))
    return 0


def _describe(row: dict[str, Any]) -> str:
    times = ", ".join(f"{model} {1000 * seconds:.0f} ms" for model, seconds in row["seconds"].items())
    ratios = ", ".join(f"{model} {ratio:.2f}x" for model, ratio in row["ratios"].items())
    return f"{times}; against {row['best_stock']}: {ratios}"
