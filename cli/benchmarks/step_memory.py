"""What a whole training step takes in memory by `fused_moe` and by `grouped_mm`, beside what the experts alone keep.

``python -m deepseek_cli.benchmarks.step_memory`` trains a small model for two steps on a CPU, each implementation in
a process of its own, and prints by how much the second step makes the process grow: activations, gradients and
whatever the backward pass needs, with weights and AdamW's moments in place before.

T tokens, K slots per token, H hidden, I expert width, E experts.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence

import torch
from torch import nn

from deepseek_cli.benchmarks.kernel_memory import kept_bytes, peak_memory
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM
from modeling_deepseek.families import find_moe_layers

IMPLEMENTATIONS = ("fused_moe", "grouped_mm")
DTYPES = ("float32", "bfloat16")
NUM_LAYERS, TOKENS = 4, 4096
_MIB = 2**20


def measure(implementation: str, dtype: torch.dtype, num_tokens: int = TOKENS) -> dict[str, int]:
    """Return the bytes that one layer's experts keep (`kept`) and those that a step takes (`step`).

    Args:
        implementation: Of the experts.
        dtype: Of the weights.
        num_tokens: T, in sequences of 256.
    """
    torch.manual_seed(0)
    config = DeepseekConfig.from_preset(
        "debug",
        vocab_size=512,
        hidden_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=NUM_LAYERS,
        first_k_dense_replace=0,
        n_routed_experts=32,
        num_experts_per_tok=8,
    )
    model = DeepseekForCausalLM(config).to(dtype).train()
    model.set_experts_implementation(implementation)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(3, 512, (num_tokens // 256, 256))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes AdamW's moments
    kept = _kept_by_experts(find_moe_layers(model)[-1].experts, config, num_tokens, dtype)
    return {"kept": kept, "step": peak_memory(step, "cpu") or 0}


def _kept_by_experts(experts: nn.Module, config: DeepseekConfig, num_tokens: int, dtype: torch.dtype) -> int:
    x = torch.randn(num_tokens, config.hidden_size, dtype=dtype, requires_grad=True)
    slots = torch.randint(0, config.n_routed_experts, (num_tokens, config.num_experts_per_tok))
    weights = torch.rand(slots.shape, dtype=dtype, requires_grad=True)
    return kept_bytes(lambda: experts(x, slots, weights), experts)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table.

    Args:
        argv: Arguments instead of the command line's.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--worker", nargs=2, metavar=("IMPLEMENTATION", "DTYPE"), help="measure one and print JSON")
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, help="per step, in sequences of 256 (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.tokens < 256 or args.tokens % 256:
        parser.error(f"--tokens: got {args.tokens}, expected a multiple of 256")
    if args.worker:
        print(json.dumps(measure(args.worker[0], getattr(torch, args.worker[1]), args.tokens)))
        return 0
    print("| dtype | step, MiB: fused_moe | grouped_mm | saved | promised by the layers | of it |")
    print("| --- | --- | --- | --- | --- | --- |")
    for dtype in DTYPES:
        found = [_in_a_process(implementation, dtype, args.tokens) for implementation in IMPLEMENTATIONS]
        saved = found[1]["step"] - found[0]["step"]
        promised = NUM_LAYERS * (found[1]["kept"] - found[0]["kept"])
        steps = " | ".join(f"{one['step'] / _MIB:.0f}" for one in found)
        print(f"| {dtype} | {steps} | {saved / _MIB:.0f} | {promised / _MIB:.0f} | {saved / promised:.2f} |")
    return 0


def _in_a_process(implementation: str, dtype: str, num_tokens: int) -> dict[str, int]:
    command = [sys.executable, "-m", "deepseek_cli.benchmarks.step_memory", "--worker", implementation, dtype]
    command += ["--tokens", str(num_tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{implementation} in {dtype}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
