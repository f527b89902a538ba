"""Measures what a source of gigabytes costs: memory, time of the first and second start, speed of the data path.

    python dev/large_source.py FOLDER --gigabytes 2

Writes FOLDER/texts.jsonl from the embedded medicine with its words varied, trains the nano model on it for some steps
in a process of its own, twice, and on the embedded medicine for comparison. The data path is timed on one thread, by
the processor's seconds: tokenizing, and putting batches together from the cached tokens in random order, as the
trainer's loader does. FOLDER may be deleted afterwards.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
from torch.utils.data import DataLoader, RandomSampler

from deepseek_records.loading import load_tokenizer
from deepseek_records.user_text import encode_documents_plainly
from deepseek_training.data.corpus import Corpus
from deepseek_training.data.packing import PackedDataset, encode_documents
from deepseek_training.data.texts import load_texts

STEPS = 40
BATCH, LENGTH = 8, 256  # of pretrain-demo


def write_texts(path: Path, num_bytes: int) -> None:
    """Write documents until the file has that size; no two are equal.

    Args:
        path: JSON Lines.
        num_bytes: The size.
    """
    rng = random.Random(0)
    words = [text.split(" ") for text in load_texts("medicine", "all")]
    pool = [word for text in words[:200] for word in text]
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < num_bytes:
            text = list(rng.choice(words))
            for _ in range(len(text) // 10):
                text[rng.randrange(len(text))] = rng.choice(pool)
            file.write(json.dumps({"text": " ".join(text)}) + "\n")


def train(data: str, output: Path, cache: Path) -> dict[str, Any]:
    """Train in a process of its own; return seconds, peak memory and the speed that was logged.

    Args:
        data: The source.
        output: The run folder.
        cache: Of `datasets`.
    """
    settings = {
        "data": data,
        "max_steps": STEPS,
        "eval_steps": 0,
        "save_steps": 0,
        "sample_steps": 0,
        "warmup_steps": 5,
    }
    options = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "deepseek_cli.main", "pretrain", "pretrain-demo", *options, "--report-to", "[]"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache)}
    began, peaks, first_step = time.monotonic(), {"RssAnon": 0, "VmHWM": 0}, 0.0
    process = subprocess.Popen([*command, "--output", str(output)], env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        for name, kilobytes in _memory(process.pid).items():
            peaks[name] = max(peaks[name], kilobytes)
        if not first_step and (output / "metrics.jsonl").exists():
            first_step = time.monotonic() - began
        time.sleep(0.1)
    assert process.returncode in (0, 3), process.returncode
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    return {
        "first_log_s": round(first_step, 1),
        "own_memory_gib": round(peaks["RssAnon"] / 2**20, 2),
        "peak_memory_gib": round(peaks["VmHWM"] / 2**20, 2),
        "training_tokens_per_second": round(max(speeds)),
    }


def measure_data_path(data: str, model: Path, cache: Path) -> dict[str, int]:
    """Return tokens per second of the processor: of tokenizing, and of batches from the cache.

    Args:
        data: The source, whose tokens the cache has.
        model: A run's model, whose tokenizer made them.
        cache: Of `datasets`.
    """
    datasets.config.HF_DATASETS_CACHE = cache
    tokenizer, corpus = load_tokenizer(str(model)), Corpus.load(data)
    sample = [corpus.train[index] for index in range(0, len(corpus.train), max(1, len(corpus.train) // 2000))]
    began = time.process_time()
    num_tokens = sum(map(len, encode_documents_plainly(sample, tokenizer)))
    tokenizing_s = time.process_time() - began
    blocks = PackedDataset(encode_documents(corpus.train, tokenizer), LENGTH)
    loader = DataLoader(blocks, batch_size=BATCH, sampler=RandomSampler(blocks, num_samples=BATCH * 2000))
    began = time.process_time()
    num_read = sum(batch["input_ids"].numel() for batch in loader)
    return {
        "tokenizing_tokens_per_second": round(num_tokens / tokenizing_s),
        "reading_tokens_per_second": round(num_read / (time.process_time() - began)),
    }


def _memory(pid: int) -> dict[str, int]:
    """Kilobytes that are the process's own, and its peak with what it has mapped of files."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) for name in ("RssAnon", "VmHWM") if name in fields}


def main() -> None:
    """Write, train and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    path = args.folder / "texts.jsonl"
    if not path.exists():
        write_texts(path, int(args.gigabytes * 1e9))
    found: dict[str, Any] = {"gigabytes": round(path.stat().st_size / 1e9, 2)}
    for name, data in (("small", "medicine"), ("first", str(path)), ("second", str(path))):
        found[name] = train(data, args.folder / f"run-{name}", args.folder / "cache")
        print(json.dumps({name: found[name]}), flush=True)
    found |= measure_data_path(str(path), args.folder / "run-second" / "model", args.folder / "cache")
    for part in ("own", "peak"):
        key = f"{part}_memory_gib"
        found[f"additional_{key}"] = round(
            max(found[one][key] for one in ("first", "second")) - found["small"][key], 2
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
