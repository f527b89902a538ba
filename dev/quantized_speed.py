"""Speed of 4-bit experts on one thread of a CPU: ours against bf16, and llama.cpp on the same models' GGUF files.

    PYTHONPATH=build/edge/llama_cpp python dev/quantized_speed.py

A model of ours with drawn weights, 4 layers of 32 experts, 4 of them per token; experts rounded to nearest in groups
of 32, which are llama.cpp's Q4_0 blocks. Times are of the processor and not by the clock, so that other work on the
machine counts less. A prompt of 256 tokens goes in one pass; a token after it is the difference between writing 33 and
1. Each is the least of three. `make edge-setup` brings llama.cpp.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from deepseek_cli.benchmarks.edge_runner import Write, load_llama_cpp
from deepseek_records.loading import load_model
from deepseek_serving.gguf_export import export_gguf
from deepseek_training.data.tokenizer import train_tokenizer
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM, quantize_experts
from modeling_deepseek.packed_checkpoint import save_packed

SIZES = {
    **{"vocab_size": 400, "hidden_size": 512, "intermediate_size": 512, "moe_intermediate_size": 512},
    **{"num_hidden_layers": 4, "first_k_dense_replace": 0, "n_routed_experts": 32, "n_shared_experts": 1},
    **{"num_experts_per_tok": 4, "min_experts_per_tok": None, "max_position_embeddings": 512},
}
PROMPT, WRITTEN, TRIES = 256, 33, 3


def save(folder: Path) -> int:
    """Write both checkpoints and both GGUF files, and return the parameters."""
    torch.manual_seed(0)
    model = DeepseekForCausalLM(DeepseekConfig.from_preset("debug", **SIZES)).bfloat16()
    count = model.num_parameters()
    model.save_pretrained(folder / "bf16")
    save_packed(quantize_experts(model, format="int4", group_size=32), folder / "int4")
    tokenizer = train_tokenizer(["a fox and a crow sat on a wall in 1999"] * 4, SIZES["vocab_size"])
    for kind in ("bf16", "int4"):
        tokenizer.save_pretrained(folder / kind)
        export_gguf(folder / kind, folder / f"{kind}.gguf")
    return int(count)


def load_ours(path: Path) -> Write:
    """Return what writes by our operator."""
    model = load_model(path, experts_implementation="fused_moe")

    def write(ids: list[int], num_new: int) -> list[int]:
        options = {"max_new_tokens": num_new, "min_new_tokens": num_new, "do_sample": False, "eos_token_id": None}
        tokens: list[int] = model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
        return tokens

    return write


def seconds(write: Write, ids: list[int], num_new: int) -> float:
    """Return the least processor time of three tries."""
    found = []
    for _ in range(TRIES):
        started = time.process_time()
        write(ids, num_new)
        found.append(time.process_time() - started)
    return min(found)


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    ids = torch.randint(3, 400, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"{save(folder):,} parameters")
        print("| reader | experts | prompt, tokens per second | after it, tokens per second |", flush=True)
        for kind in ("bf16", "int4"):
            for reader, write in (
                ("ours", load_ours(folder / kind)),
                ("llama.cpp", load_llama_cpp(folder / f"{kind}.gguf")()),
            ):
                write(ids, 2)  # what is made once
                prompt = seconds(write, ids, 1)
                each = (seconds(write, ids, WRITTEN) - prompt) / (WRITTEN - 1)
                print(f"| {reader} | {kind} | {PROMPT / prompt:.0f} | {1 / each:.1f} |", flush=True)


if __name__ == "__main__":
    main()
