"""One small model in every runtime that it is exported for: size, time to load, memory, tokens per second, same text.

``deepseek-moe bench edge`` exports MODEL, gives all runtimes the same prompts as token ids, one thread each, and holds
their greedy text against transformers'. What is not installed, or does not take the model, is left out and named.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from deepseek_cli.benchmarks.edge_browser import find_browser, measure_browser
from deepseek_cli.benchmarks.result_files import BenchmarkRun
from deepseek_records.exit_codes import MISSED, RunFailedError
from deepseek_records.loading import load_model, load_tokenizer, resolve_checkpoint
from deepseek_serving.edge.browser_export import default_runtime, export_browser, find_runtime
from deepseek_serving.edge.executorch_export import PROGRAM, export_executorch
from deepseek_serving.edge.onnx_export import export_onnx
from deepseek_serving.edge.packages import check_packages
from deepseek_serving.gguf_export import export_gguf
from deepseek_training.data.texts import load_texts
from modeling_deepseek import DeepseekConfig

_WORDS_OF_PROMPT = 12


@dataclasses.dataclass(frozen=True)
class Row:
    """One runtime.

    Args:
        name: As printed.
        size_mb: Of the model's file.
        load_s: From the file to the first token.
        memory_mib: The most that the process held; None where the system does not tell.
        added_mib: Of that, since the runtime was imported; None for a browser.
        tokens_per_second: New tokens, the reading of the prompts included; median over rounds.
        num_equal: Prompts with transformers' greedy text.
    """

    name: str
    size_mb: float
    load_s: float
    memory_mib: float | None
    added_mib: float | None
    tokens_per_second: float
    num_equal: int


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all runtimes are given.

    Args:
        folder: For exports.
        prompts: Token ids.
        max_tokens: New tokens of each.
        rounds: Timed rounds.
    """

    folder: Path
    prompts: list[list[int]]
    max_tokens: int
    rounds: int


def run(args: argparse.Namespace) -> int:
    """Print the table and write the figures.

    Args:
        args: The options of ``deepseek-moe bench edge``.

    Returns:
        3 where a runtime in fp32 wrote another text than transformers.

    Raises:
        ValueError: A number is out of range, or a package of the extra ``edge`` is absent.
    """
    for name in ("prompts", "max_tokens", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected at least 1")
    check_packages("onnx")
    source = resolve_checkpoint(args.model)
    names = ("prompts", "max_tokens", "rounds")
    bench = BenchmarkRun(
        "edge",
        args.output,
        {"model": args.model} | {name: getattr(args, name) for name in names},
        overwrite=args.overwrite,
    )
    model, tokenizer = load_model(source, dtype=torch.float32), load_tokenizer(source)
    texts = load_texts("books", "validation")
    beginnings = [" ".join(text.split()[:_WORDS_OF_PROMPT]) for text in texts * -(-args.prompts // len(texts))]
    prompts = [tokenizer(text).input_ids for text in beginnings[: args.prompts]]
    setting = Setting(bench.folder.path / "exports", prompts, args.max_tokens, args.rounds)
    setting.folder.mkdir(exist_ok=True)
    print(f"{len(prompts)} prompts, {args.max_tokens} tokens each, load {os.getloadavg()[0]:.1f}", flush=True)
    rows: list[Row] = []
    own = _measure(setting, "transformers", "transformers", Path(source))
    rows.append(_row("transformers, fp32", Path(source), own, own["tokens"]))
    export = {"model": model, "tokenizer": tokenizer, "texts": texts}
    for measure in (_onnx, _browser, _executorch, _llama_cpp):
        for row in measure(setting, Path(source), export, own["tokens"], args):
            rows.append(row)
            print(f"  {row.name}: {row.tokens_per_second:.0f} tokens per second", flush=True)
    table = format_table(rows, len(prompts))
    print(table)
    bench.finish({"rows": [dataclasses.asdict(row) for row in rows], "num_prompts": len(prompts)}, table)
    return MISSED if any("fp32" in row.name and row.num_equal < len(prompts) for row in rows) else 0


def _onnx(
    setting: Setting, source: Path, export: dict[str, Any], own: list[list[int]], args: argparse.Namespace
) -> Iterator[Row]:
    folder = setting.folder / "onnx"
    if _is_left_out("onnxruntime", lambda: export_onnx(output=folder, **export)):
        return
    for name, file in (("fp32", "model.onnx"), ("int8", "model_int8.onnx")):
        found = _measure(setting, f"onnxruntime, {name}", "onnxruntime", folder / file)
        yield _row(f"onnxruntime, {name}", folder / file, found, own)


def _browser(
    setting: Setting, source: Path, export: dict[str, Any], own: list[list[int]], args: argparse.Namespace
) -> Iterator[Row]:
    runtime = default_runtime() if args.runtime is None else Path(args.runtime)
    if find_browser() is None:
        print("  browser: left out, no Chromium is installed", flush=True)
        return
    folder = setting.folder / "browser"
    if _is_left_out("browser", lambda: find_runtime(runtime)):
        return
    if _is_left_out("browser", lambda: export_browser(output=folder, runtime=runtime, **export)):
        return
    for name, file in (("fp32", "model.onnx"), ("int8", "model_int8.onnx")):
        asked = {"file": file, "prompts": setting.prompts, "max_tokens": setting.max_tokens, "rounds": setting.rounds}
        yield _row(f"browser (WebAssembly), {name}", folder / file, measure_browser(folder, asked), own)


def _executorch(
    setting: Setting, source: Path, export: dict[str, Any], own: list[list[int]], args: argparse.Namespace
) -> Iterator[Row]:
    if importlib.util.find_spec("executorch") is None:
        print("  ExecuTorch: left out, it is not installed", flush=True)
        return
    folder = setting.folder / "executorch"
    if _is_left_out("ExecuTorch", lambda: export_executorch(output=folder, **export)):
        return
    found = _measure(setting, "ExecuTorch", "executorch", folder / PROGRAM)
    yield _row("ExecuTorch, fp32", folder / PROGRAM, found, own)


def _llama_cpp(
    setting: Setting, source: Path, export: dict[str, Any], own: list[list[int]], args: argparse.Namespace
) -> Iterator[Row]:
    """A number of experts that is dynamic is fixed at the most, and transformers writes at that number again."""
    if importlib.util.find_spec("xllamacpp") is None:
        print("  llama.cpp: left out, xllamacpp, which brings it, is not installed", flush=True)
        return
    config = export["model"].config
    fixed = config.num_experts_per_tok if getattr(config, "has_dynamic_experts", False) else None
    file = setting.folder / "model.gguf"
    if _is_left_out("llama.cpp", lambda: export_gguf(source, file, fixed_experts=fixed)):
        return
    name = "llama.cpp, fp32"
    if fixed is not None:
        at_fixed = setting.folder / "fixed"
        settings = {"min_experts_per_tok": None, "target_experts_per_tok": None, "expert_top_p": None}
        load_model(
            source, dtype=torch.float32, config=DeepseekConfig.from_pretrained(source, **settings)
        ).save_pretrained(at_fixed)
        own = _measure(setting, "transformers", "transformers", at_fixed)["tokens"]
        name = f"llama.cpp, fp32, {fixed} experts"
    yield _row(name, file, _measure(setting, "llama.cpp", "llama.cpp", file), own)


def _is_left_out(name: str, prepare: Callable[[], Any]) -> bool:
    """Prepare a runtime, or say why it does not take the model."""
    try:
        prepare()
    except ValueError as error:
        print(f"  {name}: left out, {error}", flush=True)
        return True
    return False


def _measure(setting: Setting, name: str, runtime: str, path: Path) -> dict[str, Any]:
    """What `edge_runner` tells of a runtime, in a process of its own."""
    prompts = setting.folder / "prompts.json"
    prompts.write_text(json.dumps(setting.prompts), encoding="utf-8")
    words = [runtime, path, prompts, "--max-tokens", setting.max_tokens, "--rounds", setting.rounds]
    done = subprocess.run(
        [sys.executable, "-m", "deepseek_cli.benchmarks.edge_runner", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise RunFailedError(
            f"{name}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no message'}"
        )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _row(name: str, file: Path, found: dict[str, Any], own: list[list[int]]) -> Row:
    num_tokens = sum(map(len, found["tokens"]))
    paths = file.glob("*.safetensors") if file.is_dir() else [file]
    return Row(
        name=name,
        size_mb=sum(path.stat().st_size for path in paths) / 1e6,
        load_s=found["load_s"],
        memory_mib=found["memory_mib"],
        added_mib=found.get("added_mib"),
        tokens_per_second=num_tokens / statistics.median(found["seconds"]),
        num_equal=sum(a == b for a, b in zip(found["tokens"], own, strict=True)),
    )


def format_table(rows: list[Row], num_prompts: int) -> str:
    """Return the table as Markdown.

    Args:
        rows: One per runtime.
        num_prompts: How many prompts were compared.
    """
    lines = [
        "| runtime, weights | size, MB | load, s | memory, MiB | for the model | tokens per second | same text |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        memory = ["" if value is None else f"{value:.0f}" for value in (row.memory_mib, row.added_mib)]
        lines.append(
            f"| {row.name} | {row.size_mb:.2f} | {row.load_s:.2f} | {memory[0]} | {memory[1]} | "
            f"{row.tokens_per_second:.0f} | {row.num_equal} of {num_prompts} |"
        )
    return "\n".join(lines)
