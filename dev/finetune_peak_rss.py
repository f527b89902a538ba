"""Peak memory of a whole fine-tuning on a CPU, experts in 4 bits against bf16: each in a process of its own.

    python dev/finetune_peak_rss.py

A process loads a checkpoint, trains LoRA on attention's output and the experts for five steps of 1 x 128 tokens and
saves the adapter. It has done the same on a tiny checkpoint before, whose peak is subtracted: Python, torch and what
they import late. Resident memory (VmHWM) holds the pages of the mapped checkpoint too, which the system can take back;
anonymous memory (RssAnon, looked at every 2 ms) does not.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SIZES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "n_routed_experts": 8, "moe_intermediate_size": 64},
    "26 M": {"hidden_size": 256, "num_hidden_layers": 3, "n_routed_experts": 128, "moe_intermediate_size": 128},
    "200 M": {"hidden_size": 512, "num_hidden_layers": 6, "n_routed_experts": 64, "moe_intermediate_size": 384},
}
KINDS = ("bf16", "nf4")
STEPS, LENGTH = 5, 128
VOCABULARY = 2000


def save_checkpoint(size: str, path: str) -> int:
    """Write a DeepSeek-V3 of drawn weights in bf16 and return its parameters."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    settings = {
        "vocab_size": VOCABULARY,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "q_lora_rank": None,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**settings, **SIZES[size])).to(torch.bfloat16)
    model.save_pretrained(path)
    return sum(parameter.numel() for parameter in model.parameters())


class AnonymousPeak(threading.Thread):
    """Keeps the highest anonymous memory seen, in MiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest = 0.0

    def run(self) -> None:
        """Look every 2 ms."""
        while True:
            self.highest = max(self.highest, memory_mib("RssAnon"))
            time.sleep(0.002)


def memory_mib(field: str) -> float:
    """Return a field of this process's status."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) / 1024


def fine_tune(kind: str, base: str, output: str) -> float:
    """Load, train and save, and return the last loss."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from modeling_deepseek import FourBitExpertsConfig

    quantization = {} if kind == "bf16" else {"quantization_config": FourBitExpertsConfig(format=kind)}
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, experts_implementation="fused_moe", **quantization
    )
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["o_proj"], target_parameters=experts))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(3, VOCABULARY, (STEPS, 1, LENGTH), generator=torch.Generator().manual_seed(0))
    for batch in ids:
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(output)
    return loss.item()


def measure(kind: str, tiny: str, base: str, output: str) -> dict[str, float]:
    """Fine-tune a tiny and then the real checkpoint and return both peaks beyond the tiny one's."""
    import torch

    torch.set_num_threads(1)
    anonymous = AnonymousPeak()
    anonymous.start()
    fine_tune(kind, tiny, f"{output}-tiny")
    before = {"resident": memory_mib("VmHWM"), "anonymous": anonymous.highest}
    loss = fine_tune(kind, base, output)
    after = {"resident": memory_mib("VmHWM"), "anonymous": anonymous.highest}
    return {"before": before["resident"], **{name: after[name] - before[name] for name in after}, "loss": loss}


def main() -> None:
    """Print a row for each size and kind."""
    print("| parameters | experts | resident, MiB | of bf16's | anonymous, MiB | of bf16's |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        paths = {size: str(Path(folder, size.replace(" ", ""))) for size in SIZES}
        counts = {size: _run("save", size, path) for size, path in paths.items()}
        for size in list(SIZES)[1:]:
            rows = {kind: _run("tune", kind, paths["tiny"], paths[size], f"{paths[size]}-{kind}") for kind in KINDS}
            for kind, row in rows.items():
                cells = [
                    f"{row[name]:.0f} | {row[name] / rows['bf16'][name]:.2f}" for name in ("resident", "anonymous")
                ]
                print(f"| {counts[size] / 1e6:.1f} M | {kind} | {' | '.join(cells)} |", flush=True)


def _run(*words: str) -> Any:
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["save"]:
        print(json.dumps(save_checkpoint(*sys.argv[2:])))
    elif sys.argv[1:2] == ["tune"]:
        print(json.dumps(measure(*sys.argv[2:])))
    else:
        main()
