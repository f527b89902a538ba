"""What 4-bit experts cost, by kind of rounding: the tables of docs/making_it_smaller.md.

    python dev/awq_table.py runs/small/model --group 128 [--draws 5] [--bits 8 4 3]
    python dev/awq_table.py runs/demo-real/upcycle --group 64 32 --bits 4 --draws 1 --tokens 4096 --eval-bytes 20000 \
        --without-outliers

On the model as it is, and, of one like DeepSeek's, with outliers that change nothing of what it computes: 4 of the
hidden channels have their norm's weight times 30 and all that reads them, the router too, divided by 30; 3 inner
channels of each expert times 20 in the up projection and divided by 20 in the down projection. KL is to the model
without rounding, in nats a token, on held-out books; differences in bits per byte are of pairs of windows. A draw is
another part of the training text.
"""

import argparse
import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deepseek_records.loading import load_model, load_tokenizer
from deepseek_training.compress import awq as awq_module
from deepseek_training.compress.awq import AwqSettings, awq
from deepseek_training.compress.calibration import shuffled_blocks
from deepseek_training.compress.divergence import Reference
from deepseek_training.compress.expert_stores import DenseStore, PackedStore
from deepseek_training.data.corpus import Corpus
from deepseek_training.data.packing import encode_documents
from deepseek_training.recipes.quantize import QuantizeSettings
from deepseek_training.trainer.held_out import HeldOut
from modeling_deepseek.families import find_moe_layers

NEAREST = {"grid": 0, "is_clipped": False}
# Not symmetric about zero: what llama.cpp's Q4_1 stores, and pack-quantized only with zero points.
BETWEEN = "nearest, from least to largest"
KINDS: dict[str, dict[str, Any]] = {
    "nearest": NEAREST,
    "AWQ": {"is_clipped": False},
    "AWQ, clipped": {},
    "nearest, fed back": {"grid": 0, "is_clipped": False, "is_fed_back": True},
    "clipped, fed back": {"grid": 0, "is_fed_back": True},
    "AWQ, clipped, fed back": {"is_fed_back": True},
    "AWQ, clipped, powers of two": {"is_power_of_two": True},
}


@torch.no_grad()
def poison(model: Any, seed: int) -> Any:
    """Give a DeepSeek-style model outliers that change nothing of what it computes, and return it."""
    generator = torch.Generator().manual_seed(seed)
    for layer in find_moe_layers(model):
        block, experts = layer.block, layer.experts
        width, inner = experts.down_proj.shape[1:]
        scale = torch.ones(width)
        scale[torch.randperm(width, generator=generator)[:4]] = 1 / 30
        model.get_submodule(layer.name.rpartition(".")[0]).post_attention_layernorm.weight.data /= scale
        linears = (block.gate, block.shared_experts.gate_proj, block.shared_experts.up_proj)
        for weight in (*(one.weight for one in linears), experts.gate_up_proj):
            weight.data *= scale
        for expert in range(len(experts.down_proj)):
            scale = torch.ones(inner)
            scale[torch.randperm(inner, generator=generator)[:3]] = 1 / 20
            experts.down_proj.data[expert] *= scale
            experts.gate_up_proj.data[expert, inner:] /= scale[:, None]
    return model


def without_router(*args: Any) -> Any:
    """Find a fold as `awq` does, and leave the router out of it."""
    fold = find_fold(*args)
    router = {id(parameter) for parameter in args[0].router.parameters()}
    return dataclasses.replace(fold, readers=tuple(one for one in fold.readers if id(one) not in router))


@torch.no_grad()
def round_between(model: Any, group: int, bits: int) -> Any:
    """Round a copy's experts to even levels between the least and the largest weight of each group, and return it."""
    changed = copy.deepcopy(model)
    for layer in find_moe_layers(changed):
        for stack in (layer.experts.gate_up_proj.data, layer.experts.down_proj.data):
            groups = stack.view(*stack.shape[:2], -1, group)
            least = groups.amin(3, keepdim=True)
            step = ((groups.amax(3, keepdim=True) - least) / (2**bits - 1)).clamp(min=1e-12)
            groups.copy_(((groups - least) / step).round() * step + least)
    return changed


find_fold = awq_module.find_fold


class Table:
    """Measures variants of one model.

    Args:
        model: Without rounding.
        tokenizer: Its own.
        draws: How many parts of the text calibrate in turn.
        tokens: Of each part.
        eval_bytes: Of the held-out text.
    """

    def __init__(self, model: Any, tokenizer: Any, draws: int, tokens: int, eval_bytes: int) -> None:
        corpus = Corpus.load("books", None)
        blocks = shuffled_blocks(encode_documents(corpus.train, tokenizer), 256)
        count = tokens // 256
        self.draws = [blocks[start : start + count] for start in range(0, count * draws, count)]
        held_out = HeldOut.prepare("books", corpus.validation, tokenizer, eval_bytes)
        self.reference = Reference.of(model, held_out, QuantizeSettings(model=""))

    def row(self, name: str, make: Callable[[Tensor], Any], draws: int | None = None) -> float:
        """Print one variant's figures, the mean and range over draws, and return its mean KL."""
        found = [self.reference.compare(make(blocks)) for blocks in self.draws[:draws]]
        kl = [one.divergence for one in found]
        bits = [one.difference.value for one in found]
        spread = f" [{min(kl):.5f} {max(kl):.5f}]" if len(kl) > 1 else ""
        wide = f" [{min(bits):+.5f} {max(bits):+.5f}]" if len(bits) > 1 else ""
        mean_kl, mean_bits, error = sum(kl) / len(kl), sum(bits) / len(bits), found[0].difference.stderr
        share = 100 * mean_bits / found[0].before.value
        print(
            f"{name:45} | {mean_kl:.5f}{spread} | {mean_bits:+.5f}{wide} +- {error:.5f} | {share:+.3f} %", flush=True
        )
        return mean_kl

    def rounded(self, model: Any, group: int, bits: int, kind: dict[str, Any]) -> Callable[[Tensor], Any]:
        """Return what rounds a copy of a model by given text."""
        settings = AwqSettings(group_size=group, bits=bits, **kind)

        def make(blocks: Tensor) -> Any:
            changed = copy.deepcopy(model)
            awq(changed, blocks, settings, PackedStore if bits == 4 else DenseStore)
            return changed

        return make

    def rows_with_outliers(self, model: Any, group: int, seed: int) -> None:
        """Print the int4 variants of a model that has got outliers."""
        poisoned = poison(copy.deepcopy(model), seed)
        kl = {
            name: self.row(f"outliers {seed}, int4, {name}", self.rounded(poisoned, group, 4, kind), draws=1)
            for name, kind in KINDS.items()
        }
        awq_module.find_fold = without_router  # type: ignore[assignment]
        self.row(f"outliers {seed}, int4, router left out", self.rounded(poisoned, group, 4, {}), draws=1)
        awq_module.find_fold = find_fold
        ratios = [kl["nearest"] / kl[name] for name in ("AWQ", "AWQ, clipped")]
        print(f"outliers {seed}: nearest over AWQ {ratios[0]:.2f}, over AWQ clipped {ratios[1]:.2f}", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--group", type=int, nargs="+", default=[128])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3])
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, BETWEEN], default=list(KINDS))
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048, help="that calibrate")
    parser.add_argument("--eval-bytes", type=int, default=150_000)
    parser.add_argument("--without-outliers", action="store_true")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, dtype=torch.float32), load_tokenizer(args.model)
    model.set_experts_implementation("fused_moe")
    table = Table(model, tokenizer, args.draws, args.tokens, args.eval_bytes)
    before = table.reference.before
    print(f"books: {before.value:.4f} +- {before.stderr:.4f} bits per byte")
    print("variant | KL, mean [range] | difference in bits per byte, mean [range] +- error of the text | share")
    if args.kinds == list(KINDS):
        table.row("bf16", lambda _: copy.deepcopy(model).bfloat16(), draws=1)
    for group, bits in itertools.product(args.group, args.bits):
        for name in args.kinds:
            title = f"int{bits}, groups of {group}, {name}"
            if name == BETWEEN:
                table.row(title, lambda _, size=(group, bits): round_between(model, *size), draws=1)
                continue
            made = table.rounded(model, group, bits, KINDS[name])
            table.row(title, made, draws=1 if KINDS[name] == NEAREST else None)
    if not args.without_outliers:
        for seed in range(3):
            table.rows_with_outliers(model, args.group[0], seed)


if __name__ == "__main__":
    main()
