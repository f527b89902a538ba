"""What batching of requests gains: `deepseek-moe serve` with several clients against `generate` in a loop.

``deepseek-moe bench serving MODEL`` starts the real command in a process of its own and asks it over HTTP, greedy,
with the same prompts that a loop over `generate` continues one after the other. The kinds take turns within one run,
and every answer's text is held against the loop's.
"""

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from deepseek_cli.benchmarks.result_files import BenchmarkRun
from deepseek_records.exit_codes import RunFailedError
from deepseek_records.loading import load_model, load_tokenizer
from deepseek_records.user_text import encode, protect
from deepseek_training.data.texts import load_texts

CLIENTS = (1, 4, 16)
LOOP = "generate in a loop"


@dataclass
class Answer:
    """One continued prompt.

    Attributes:
        text: The continuation.
        num_tokens: Tokens written.
        seconds: From the request to the whole answer.
    """

    text: str
    num_tokens: int
    seconds: float


def make_prompts(number: int) -> list[str]:
    """Return the first 4 to 19 words of embedded documents.

    Args:
        number: How many.
    """
    texts = load_texts("books")
    paragraphs = [part for text in texts for part in text.split("\n\n") if len(part.split()) > 20]
    return [" ".join(part.split()[: 4 + place % 16]) for place, part in enumerate(paragraphs[:number])]


@contextmanager
def started_server(model: str, max_tokens: int) -> Iterator[int]:
    """Run the command, yield its port and end it.

    Args:
        model: As for the command.
        max_tokens: Likewise.

    Raises:
        RunFailedError: It did not start.
    """
    words = [model, "--port", "0", "--name", "model", "--max-tokens", str(max_tokens)]
    command = [sys.executable, "-m", "deepseek_cli.main", "serve", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            said = re.search(r"http://127\.0\.0\.1:(\d+)/v1", process.stdout.readline())
            if said is None:
                raise RunFailedError(
                    "bench serving: the server did not start; deepseek-moe serve with this model says why"
                )
            yield int(said[1])
        finally:
            process.terminate()


def ask(port: int, max_tokens: int, prompt: str) -> Answer:
    """Ask the server for one answer.

    Args:
        port: Where it listens.
        max_tokens: Of the answer.
        prompt: What is continued.

    Raises:
        RunFailedError: The server refused.
    """
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = {"model": "model", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    told = json.loads(connection.getresponse().read())
    connection.close()
    if "choices" not in told:
        raise RunFailedError(f"bench serving: the server refused ({told['error']['message']})")
    return Answer(told["choices"][0]["text"], told["usage"]["completion_tokens"], time.perf_counter() - began)


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


def measure(kinds: dict[str, Any], prompts: list[str], rounds: int) -> dict[str, Any]:
    """Return tokens per second and seconds per answer of each kind, in turn, and how many texts equal the loop's.

    Args:
        kinds: (Clients, function of a prompt) by name; the loop among them.
        prompts: Asked in each round by each kind.
        rounds: The median of these is taken; one more comes before them.
    """
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    answers: dict[str, list[Answer]] = {}
    for turn in range(rounds + 1):
        for name, (num_clients, answer) in kinds.items():
            with ThreadPoolExecutor(num_clients) as pool:
                began = time.perf_counter()
                answers[name] = list(pool.map(answer, prompts))
                seconds = time.perf_counter() - began
            if turn:
                rates[name].append(sum(one.num_tokens for one in answers[name]) / seconds)
    return {name: _describe(rates[name], answers[name], answers[LOOP]) for name in kinds}


def _describe(rates: list[float], answers: list[Answer], expected: list[Answer]) -> dict[str, float]:
    seconds = sorted(one.seconds for one in answers)
    return {
        "tokens_per_second": statistics.median(rates),
        "p50_s": seconds[len(seconds) // 2],
        "p95_s": seconds[len(seconds) * 95 // 100],
        "num_equal": sum(one.text == other.text for one, other in zip(answers, expected, strict=True)),
    }


def format_table(figures: dict[str, Any], num_prompts: int) -> str:
    """Return the table.

    Args:
        figures: From `measure`.
        num_prompts: Of each round.
    """
    lines = [
        "| | tokens/s | against the loop | answer p50, s | p95, s | same text |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in figures.items():
        rate = row["tokens_per_second"]
        ratio = rate / figures[LOOP]["tokens_per_second"]
        times = f"{row['p50_s']:.2f} | {row['p95_s']:.2f}"
        lines.append(f"| {name} | {rate:.0f} | {ratio:.2f} | {times} | {row['num_equal']} of {num_prompts} |")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Print the table and write all figures as JSON.

    Args:
        args: The options of ``deepseek-moe bench serving``.

    Raises:
        ValueError: A number is out of range.
    """
    for name in ("prompts", "max_tokens", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected at least 1")
    model, tokenizer = load_model(args.model, attn_implementation="sdpa"), load_tokenizer(args.model)
    settings = {"model": args.model, "prompts": args.prompts, "max_tokens": args.max_tokens, "rounds": args.rounds}
    bench = BenchmarkRun("serving", args.output, settings, overwrite=args.overwrite)
    prompts = make_prompts(args.prompts)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads each in server and loop, load "
        f"{os.getloadavg()[0]:.1f}, {size:.1f} M parameters, {len(prompts)} prompts, {args.max_tokens} tokens each",
        flush=True,
    )
    with started_server(args.model, args.max_tokens) as port:
        kinds: dict[str, Any] = {LOOP: (1, partial(generate, model, tokenizer, args.max_tokens))}
        for number in CLIENTS:
            kinds[f"serve, {number} client{'s' * (number > 1)}"] = (number, partial(ask, port, args.max_tokens))
        figures = measure(kinds, prompts, args.rounds)
    table = format_table(figures, len(prompts))
    print(table)
    bench.finish(figures, table)
    return 0
