"""Measures on a tiny model of every MoE family of transformers what works, and writes docs/families.md of it.

    python dev/moe_families.py                 prints the table
    python dev/moe_families.py --write         writes it into docs/families.md
    python dev/moe_families.py --only mixtral  some families

Each column is a function that returns what it shows, or raises. The slow tests hold every cell against what the table
says, so a family that stops working is found when transformers changes.
"""

import argparse
import copy
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from family_uses import YES, RefusedError, layers_of, loses_experts, replays_a_rollout, runs_in_four_bits
from peft import LoraConfig, get_peft_model
from tiny_families import build_tiny, find_experts_classes, logits_of, loss_of, token_ids
from torch import nn
from transformers import PreTrainedModel

import modeling_deepseek  # noqa: F401  (registers fused_moe)
from deepseek_training.balance.callback import ExpertBalanceCallback
from modeling_deepseek.families import MoeLayer, find_moe_layers

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
NONE = "-"
SPEED = 0.01


@dataclass
class Family:
    """One row of the table.

    Attributes:
        name: Folder in transformers/models.
        experts: Class name.
        router: Class name.
        scores: Key of `modeling_deepseek.families.SCORES`.
        bias: Attribute of the balancing bias; `NONE` where there is none.
        shared: Whether there are shared experts.
        cells: By column, `YES`, `NONE` or ``no``.
        reasons: By column, why it is ``no``.
    """

    name: str
    experts: str
    router: str = NONE
    scores: str = NONE
    bias: str = NONE
    shared: str = NONE
    cells: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def is_fused(build: Callable[[], PreTrainedModel]) -> str:
    """Logits and input gradients with `fused_moe` equal those of transformers' own loop."""
    found = []
    for implementation in ("eager", "fused_moe"):
        model = build()
        model.set_experts_implementation(implementation)
        try:
            logits = logits_of(model, token_ids())
        except ValueError as error:
            raise RefusedError(str(error).removeprefix("experts_implementation: ")) from None
        logits.square().mean().backward()
        found.append((logits.detach(), model.get_input_embeddings().weight.grad))
    for eager, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-3, atol=1e-5)
    return YES


def is_counted(build: Callable[[], PreTrainedModel]) -> str:
    """The load counted by the callback equals what the experts modules are given."""
    model = build().train()
    layers = layers_of(model)
    given = [torch.zeros(layer.num_experts or 0, dtype=torch.int64) for layer in layers]
    for layer, load in zip(layers, given, strict=True):
        layer.experts.register_forward_pre_hook(_count_into(load), with_kwargs=True)
    callback = ExpertBalanceCallback()
    callback.begin(model)
    loss_of(model, token_ids()).backward()
    counts = callback._observer.take(over_ranks=False)
    if len(counts) != len(layers):
        raise RefusedError(f"counted {len(counts)} of {len(layers)} layers")
    for counted, load in zip(counts, given, strict=True):
        if not torch.equal(counted.tokens_per_expert[: len(load)], load):
            raise RefusedError(f"counted {counted.tokens_per_expert.tolist()} where experts got {load.tolist()}")
    return YES


def _count_into(load: torch.Tensor) -> Callable[..., None]:
    def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
        tensors = [tensor for tensor in (*args, *kwargs.values()) if isinstance(tensor, torch.Tensor)]
        (indices,) = [tensor for tensor in tensors if not tensor.is_floating_point()]
        (weights,) = [tensor for tensor in tensors if tensor.shape == indices.shape and tensor.is_floating_point()]
        is_used = (indices < len(load)) & (weights != 0)
        load.add_(torch.bincount(indices[is_used], minlength=len(load)))

    return count


def moves_bias(build: Callable[[], PreTrainedModel]) -> str:
    """One step moves the bias of every layer against its load."""
    model = build().train()
    before = {layer.name: layer.bias.clone() for layer in layers_of(model) if layer.bias is not None}
    if not before:
        return NONE
    callback = ExpertBalanceCallback(bias_update_speed=SPEED)
    callback.begin(model)
    loss_of(model, token_ids()).backward()
    callback.finish_step()
    counted = zip(callback._observer.counted_layers, callback._window, strict=True)
    seen = {layer.name: (layer, counts.tokens_per_expert.double()) for layer, counts in counted}
    for name, old in before.items():
        if name not in seen:
            raise RefusedError(f"{name} was not counted")
        layer, load = seen[name]
        moved = (layer.bias - old)[: len(load)].double()
        if not moved.any() or moved @ (load - load.mean()) >= 0:
            raise RefusedError(f"{name} moved by {moved.tolist()} at load {load.tolist()}")
    return YES


def has_sequence_gradient(build: Callable[[], PreTrainedModel]) -> str:
    """The sequence-wise loss changes the router's gradient."""
    return _changes_gradient(build, "seq_aux_loss_coef")


def has_z_gradient(build: Callable[[], PreTrainedModel]) -> str:
    """The z-loss changes the router's gradient."""
    return _changes_gradient(build, "router_z_loss_coef")


def _changes_gradient(build: Callable[[], PreTrainedModel], setting: str) -> str:
    found = []
    for settings in ({}, {setting: 1.0}):
        model, callback = build().train(), ExpertBalanceCallback(**settings)
        torch.manual_seed(0)
        try:
            callback.begin(model)
        except ValueError as error:
            raise RefusedError(str(error)) from None
        loss_of(model, token_ids()).backward()
        found.append([_router_gradient(layer) for layer in layers_of(model)])
    for number, (without, having) in enumerate(zip(*found, strict=True)):
        if torch.equal(without, having):
            raise RefusedError(f"the router of layer {number} gets no gradient")
    return YES


def _router_gradient(layer: MoeLayer) -> torch.Tensor:
    gradients = [parameter.grad for parameter in layer.router.parameters() if parameter.grad is not None]
    return torch.cat([gradient.flatten() for gradient in gradients]) if gradients else torch.zeros(1)


def trains_lora(build: Callable[[], PreTrainedModel]) -> str:
    """LoRA on every experts tensor: each B gets a gradient, and merging gives the adapter's own output."""
    model = build()
    layers = layers_of(model)
    names = [name for name, tensor in layers[0].experts.named_parameters() if tensor.ndim == 3]
    parts = {type(layer.experts): dict(model.named_modules()) for layer in layers}
    targets = sorted(
        {f"{name.rpartition('.')[2]}.{part}" for name, module in next(iter(parts.values())).items()
         if any(module is layer.experts for layer in layers) for part in names}
    )  # fmt: skip
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=targets))
    base = adapted.get_base_model()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    loss_of(base, token_ids()).backward()
    gradients = {name: parameter.grad for name, parameter in adapted.named_parameters() if "lora_B" in name}
    if len(gradients) != len(names) * len(layers):
        raise RefusedError(f"{len(gradients)} adapters for {len(names) * len(layers)} experts tensors")
    dead = [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]
    if dead:
        raise RefusedError(f"{len(dead)} of {len(gradients)} adapters get no gradient")
    with torch.no_grad():
        one = logits_of(base, token_ids())
        other = logits_of(adapted.merge_and_unload(), token_ids())
    torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)
    return YES


COLUMNS: dict[str, Callable[[Callable[[], PreTrainedModel]], str]] = {
    "fused": is_fused,
    "counted": is_counted,
    "bias moves": moves_bias,
    "sequence loss": has_sequence_gradient,
    "z-loss": has_z_gradient,
    "LoRA": trains_lora,
    "quantized": runs_in_four_bits,
    "replay": replays_a_rollout,
    "fewer experts": loses_experts,
}


def survey(module: str, experts: str, columns: Sequence[str] = tuple(COLUMNS)) -> Family:
    """Return one row.

    Args:
        module: From `find_experts_classes`.
        experts: Likewise.
        columns: Of `COLUMNS`.
    """
    family = Family(module.split(".")[2], experts)
    model = build_tiny(module, experts)
    layers = find_moe_layers(model)
    if layers:
        layer = next((layer for layer in layers if layer.bias is not None), layers[0])
        family.router, family.scores = type(layer.router).__name__, layer.scores
        family.bias = NONE if layer.bias_owner is None or layer.bias is None else layer.bias_owner[1]
        family.shared = YES if layer.shared else NONE
    for column in columns:
        try:
            family.cells[column] = COLUMNS[column](lambda: copy.deepcopy(model))
        except (RefusedError, AssertionError) as error:
            family.cells[column] = "no"
            family.reasons[column] = " ".join(str(error).split())
    return family


def as_markdown(families: Sequence[Family]) -> str:
    """Return the page."""
    names = list(COLUMNS)
    rows = [
        [f"`{row.name}`", f"`{row.experts}`", row.scores, f"`{row.bias}`" if row.bias != NONE else NONE, row.shared]
        + [row.cells.get(name, "") for name in names]
        for row in families
    ]
    head = ["family", "experts", "scores", "bias", "shared experts", *names]
    table = "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
    counted = [
        f"| {name} | {sum(row.cells[name] == YES for row in families)} | "
        f"{sum(row.cells[name] == 'no' for row in families)} | {sum(row.cells[name] == NONE for row in families)} |"
        for name in names
    ]
    refused = [
        f"- `{row.experts}`, {column}: `{reason}`" for row in families for column, reason in row.reasons.items()
    ]
    return _PAGE.format(
        version=transformers.__version__,
        table=table,
        counted="\n".join(["| column | yes | no | - |", "| --- | --- | --- | --- |", *counted]),
        refused="\n".join(refused) or "None.",
    )


_PAGE = """# MoE families

<!-- Made by `python dev/moe_families.py --write`; not edited by hand. -->

What works with each MoE family of transformers {version}, measured on a tiny model of each experts class.
`modeling_deepseek/families.py` finds routers, experts and balancing biases; there is no code for a single family.

- fused: `experts_implementation="fused_moe"` computes the same logits and gradients as transformers' own loop.
- counted: `ExpertBalanceCallback` and `TrainingFigures` count exactly the tokens that each expert is given.
- bias moves: `ExpertBalanceCallback(bias_update_speed=...)` moves the balancing bias against the load.
- sequence loss, z-loss: `seq_aux_loss_coef` and `router_z_loss_coef` of the callback change the router's gradient.
- LoRA: `LoraConfig(target_parameters=...)` on every experts tensor trains, and merging keeps the output.
- quantized: `quantize_experts` computes what the matrices it stores compute in transformers' own loop, with gradients.
- replay: `RouterReplay` gives a pass the experts of the rollout, whatever the routers have become.
- fewer experts: `deepseek-moe shrink` halves the experts, and what it saves is loaded with the same logits.

"no" has its reason below; "-" means that the family has no balancing bias.

{counted}

{table}

## Refused

{refused}
"""


def main() -> int:
    """Print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--only", nargs="+", help="families, by their folder in transformers/models")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    chosen = [(module, name) for module, name in find_experts_classes() if not args.only or _is_in(module, args.only)]
    families = []
    for number, (module, name) in enumerate(chosen, 1):
        families.append(survey(module, name))
        print(
            f"{number}/{len(chosen)} {name} {families[-1].cells} {families[-1].reasons}", file=sys.stderr, flush=True
        )
    page = as_markdown(families)
    if args.write:
        PAGE.write_text(page, encoding="utf-8")
    else:
        print(page)
    return 0


def _is_in(module: str, families: Sequence[str]) -> bool:
    return module.split(".")[2] in families


if __name__ == "__main__":
    sys.exit(main())
