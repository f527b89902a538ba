"""Peak memory of loading a checkpoint and generating from it on a CPU: 4-bit experts against bf16, each a process.

    python dev/quantized_peak_rss.py

The model is a Qwen3-MoE of 128 experts with drawn weights; rounding to nearest, for drawn weights have nothing to
calibrate. A process has done the same on a tiny checkpoint before, whose peak is subtracted: Python, torch and what
they import late. Resident memory (VmHWM) holds the pages of the mapped checkpoint too, which the system can take back.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_experts": 8, "moe_intermediate_size": 128},
    "large": {"hidden_size": 512, "num_hidden_layers": 8, "num_experts": 128, "moe_intermediate_size": 384},
}
TOKENS = 32


def save(size: str, folder: str) -> int:
    """Write both checkpoints of a size and return the parameters."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    from modeling_deepseek import quantize_experts
    from modeling_deepseek.packed_checkpoint import save_packed

    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "num_experts_per_tok": 8}
    config = Qwen3MoeConfig(vocab_size=2000, intermediate_size=512, **heads, **SIZES[size])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(f"{folder}/{size}-bf16")
    count = model.num_parameters()
    save_packed(quantize_experts(model, format="int4"), f"{folder}/{size}-int4")
    return int(count)


def peak_mib() -> float:
    """Return the most resident memory of this process so far."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def generate(path: str) -> float:
    """Load, generate, and return the seconds of the generation."""
    import torch

    from deepseek_records.loading import load_model

    model = load_model(path, experts_implementation="fused_moe")
    ids = torch.arange(16)[None]
    started = time.monotonic()
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    return time.monotonic() - started


def measure(folder: str, kind: str) -> dict[str, float]:
    """Return the figures of one kind, in a process of its own."""
    words = [sys.executable, __file__, "measure", folder, kind]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure both kinds and print them."""
    if sys.argv[1:2] == ["measure"]:
        folder, kind = sys.argv[2:]
        generate(f"{folder}/tiny-{kind}")
        floor = peak_mib()
        seconds = generate(f"{folder}/large-{kind}")
        print(json.dumps({"mib": peak_mib() - floor, "whole_mib": peak_mib(), "seconds": seconds}))
        return
    if sys.argv[1:2] == ["save"]:
        save("tiny", sys.argv[2])
        print(save("large", sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "save", folder]
        count = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        print(f"{count:,} parameters, 128 experts")
        found = {kind: measure(folder, kind) for kind in ("bf16", "int4")}
        for kind, one in found.items():
            disk = sum(file.stat().st_size for file in Path(folder, f"large-{kind}").glob("*.safetensors"))
            print(
                f"{kind}: {one['mib']:.0f} MiB above the tiny model's, {one['whole_mib']:.0f} MiB in all, "
                f"{disk / 2**20:.0f} MiB on disk, {TOKENS / one['seconds']:.1f} tokens per second"
            )
        print(f"int4 over bf16: {found['int4']['mib'] / found['bf16']['mib']:.3f}")


if __name__ == "__main__":
    main()
