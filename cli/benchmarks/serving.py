"""How serving grows with clients: our endpoint, Triton, `transformers serve` and vLLM on one model, in one run.

``deepseek-moe bench serving`` builds a small model that all of them can load (random weights, DeepSeek-V3's class,
latents of 512 and rotated keys of 64, as vLLM wants on a CPU), or takes MODEL. Generation is held against a loop over
`generate`, scoring by Triton with dynamic batching against Triton without it; every answer is held against
transformers' own. Each server runs in a process of its own and is asked over HTTP.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deepseek_cli.benchmarks import serving_peers as peers
from deepseek_cli.benchmarks.result_files import BenchmarkRun
from deepseek_cli.benchmarks.serving_load import Answer, make_prompts, run_load
from deepseek_cli.benchmarks.serving_table import draw, format_tables
from deepseek_records.exit_codes import RunFailedError
from deepseek_records.loading import load_model, load_tokenizer
from deepseek_records.user_text import encode, protect
from deepseek_serving.hf_export import export_deepseek_v3
from deepseek_serving.triton_server.batched_compute import log_likelihoods
from deepseek_training.data.texts import load_texts
from deepseek_training.data.tokenizer import train_tokenizer
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

LOOP = "generate in a loop"
CLIENTS = (1, 2, 4, 8, 16, 32, 64)
# What a short run asks for; the model of random weights is called so in the table.
BUILT = "built"
_SCORED_PER_PROMPT = 4


def build_model(folder: Path) -> None:
    """Write a model of random weights and a tokenizer.

    Args:
        folder: Where to.
    """
    torch.manual_seed(0)
    config = DeepseekConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=4,
        first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=16,
        num_experts_per_tok=2, n_group=1, topk_group=1, kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64,
        qk_nope_head_dim=64, v_head_dim=64, max_position_embeddings=512, num_nextn_predict_layers=0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.1,
    )  # fmt: skip
    model = DeepseekForCausalLM(config).eval()
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.normal_(0, 0.1)
    export_deepseek_v3(model, folder)
    train_tokenizer(load_texts("books"), config.vocab_size, model_max_length=512).save_pretrained(folder)


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, max_tokens: int, prompt: str) -> Answer:
    """Continue one prompt in this process.

    Args:
        model: In evaluation mode.
        tokenizer: The model's.
        max_tokens: Of the answer.
        prompt: What is continued.
    """
    began = time.perf_counter()
    ids = torch.tensor([encode(protect(prompt, tokenizer), tokenizer, add_special_tokens=True)])
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
    )[0, ids.shape[1] :]
    text = tokenizer.decode(written, skip_special_tokens=True)
    return Answer(text, len(written), time.perf_counter() - began)


def score(model: Any, tokenizer: Any, text: str) -> Answer:
    """Score one text in this process.

    Args:
        model: In evaluation mode.
        tokenizer: The model's.
        text: What is scored.
    """
    began = time.perf_counter()
    ids = encode(protect(text, tokenizer), tokenizer, add_special_tokens=True)
    scores, counts = log_likelihoods(model, [([], ids)], 1 << 20)
    return Answer(float(scores[0]), int(counts[0]), time.perf_counter() - began)


def measure(
    kinds: Mapping[str, Callable[[], AbstractContextManager[peers.Ask]]],
    prompts: list[str],
    expected: list[Any],
    *,
    clients: list[int],
    rounds: int,
) -> dict[str, Any]:
    """Return each kind's figures by number of clients, the median of the rounds.

    Args:
        kinds: What starts each server, by its name in the table.
        prompts: Asked in each round.
        expected: The right answers.
        clients: Numbers of clients.
        rounds: Timed rounds of each number; one more, of the most clients, comes first.
    """
    figures: dict[str, Any] = {}
    for name, start in kinds.items():
        try:
            with start() as ask:
                run_load(ask, prompts, max(clients), None)
                figures[name] = {
                    str(number): _median([run_load(ask, prompts, number, expected) for _ in range(rounds)])
                    for number in clients
                }
        except (peers.AbsentError, RunFailedError) as error:  # the others are measured all the same
            figures[name] = {"absent": str(error)}
        print(f"{name}: {_summarize(figures[name])}", flush=True)
    return figures


def _median(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {
        key: min(one[key] for one in rounds) if key == "num_equal" else statistics.median(one[key] for one in rounds)
        for key in rounds[0]
    }


def _summarize(figures: dict[str, Any]) -> str:
    if "absent" in figures:
        return f"left out ({figures['absent']})"
    return ", ".join(f"{number}: {row['tokens_per_second']:.0f}" for number, row in figures.items()) + " tokens/s"


def run(args: argparse.Namespace) -> int:
    """Print the tables and write figures and picture.

    Args:
        args: The options of ``deepseek-moe bench serving``.

    Raises:
        ValueError: A number is out of range.
    """
    for name in ("prompts", "max_tokens", "rounds", "most_clients"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected at least 1")
    names = ("prompts", "max_tokens", "rounds", "most_clients")
    settings = {"model": args.model} | {name: getattr(args, name) for name in names}
    bench = BenchmarkRun("serving", args.output, settings, overwrite=args.overwrite)
    source = args.model
    if source == BUILT:
        source = str(bench.folder.path / "model")
        build_model(Path(source))
    model, tokenizer = load_model(source, attn_implementation="sdpa"), load_tokenizer(source)
    prompts = make_prompts(args.prompts)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads in each server, load {os.getloadavg()[0]:.1f}, "
        f"{size:.1f} M parameters, {len(prompts)} prompts, {args.max_tokens} tokens each",
        flush=True,
    )
    clients = [number for number in CLIENTS if number <= args.most_clients]
    loop = partial(generate, model, tokenizer, args.max_tokens)
    loop(prompts[0])
    rounds = [run_load(loop, prompts, 1, None) for _ in range(args.rounds)]
    texts = [loop(prompt).value for prompt in prompts]
    scored = prompts * _SCORED_PER_PROMPT
    scores = [score(model, tokenizer, text).value for text in prompts] * _SCORED_PER_PROMPT
    generation = {LOOP: {"1": _median(rounds) | {"num_equal": len(prompts)}}}
    kinds = {
        "transformers serve": partial(peers.transformers_serve, source, args.max_tokens),
        "deepseek-moe serve": partial(peers.endpoint, source, args.max_tokens),
        "Triton, generate": partial(peers.triton, source, args.max_tokens, kind="generate"),
        "vLLM": partial(peers.vllm, source, args.max_tokens),
    }
    generation |= measure(kinds, prompts, texts, clients=clients, rounds=args.rounds)
    batching = {
        "batching on": partial(peers.triton, source, args.max_tokens, kind="score"),
        "batching off": partial(peers.triton, source, args.max_tokens, kind="score", max_batch=1),
    }
    scoring = measure(batching, scored, scores, clients=clients, rounds=args.rounds)
    figures = {"generation": generation, "scoring": scoring, "prompts": len(prompts), "scored": len(scored)}
    tables = format_tables(figures)
    print(tables)
    draw(figures, bench.folder.path / "serving.png")
    bench.finish(json.loads(json.dumps(figures)), tables)
    return 0
