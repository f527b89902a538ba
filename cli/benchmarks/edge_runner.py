"""One runtime with one model in a process of its own: load, write, and tell times, memory and tokens as JSON.

`deepseek_cli.benchmarks.edge` starts it. Only the runtime that is measured is imported, so that the memory is its own.
"""

import argparse
import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

# Writes a prompt's continuation of so many tokens.
Write = Callable[[list[int], int], list[int]]


def load_transformers(path: Path) -> Callable[[], Write]:
    """Return what loads a checkpoint into torch.

    Args:
        path: The checkpoint.
    """
    import torch

    from deepseek_records.loading import load_model

    torch.set_num_threads(1)

    def load() -> Write:
        model = load_model(path, dtype=torch.float32)

        def write(ids: list[int], num_new: int) -> list[int]:
            options = {"max_new_tokens": num_new, "min_new_tokens": num_new, "do_sample": False, "eos_token_id": None}
            tokens: list[int] = model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
            return tokens

        return write

    return load


def load_onnxruntime(path: Path) -> Callable[[], Write]:
    """Return what loads a graph with a cache into onnxruntime.

    Args:
        path: The file in an exported folder.
    """
    import onnxruntime  # noqa: F401

    from deepseek_serving.edge.onnx_decoder import OnnxDecoder

    return lambda: OnnxDecoder.of_folder(path.parent, path.name).generate


def load_executorch(path: Path) -> Callable[[], Write]:
    """Return what loads a program into ExecuTorch.

    Args:
        path: The ``.pte`` file.
    """
    import executorch.runtime  # noqa: F401
    import torch

    from deepseek_serving.edge.executorch_export import ExecutorchDecoder

    torch.set_num_threads(1)
    return lambda: ExecutorchDecoder(path).generate


def load_llama_cpp(path: Path) -> Callable[[], Write]:
    """Return what loads a GGUF file into llama.cpp, with the cache in fp32.

    Args:
        path: The file.
    """
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel, options.verbosity = str(path), 512, 1, -1
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED

    def load() -> Write:
        server = xllamacpp.Server(options)

        def write(ids: list[int], num_new: int) -> list[int]:
            written: list[int] = []
            while len(written) < num_new:  # it stops behind an end token, which the others write over
                asked = {"prompt": ids + written, "n_predict": num_new - len(written), "temperature": 0}
                asked |= {"cache_prompt": False, "return_tokens": True}
                request = urllib.request.Request(
                    f"{server.listening_address}/completion",
                    json.dumps(asked).encode(),
                    {"Content-Type": "application/json"},
                )
                with urllib.request.urlopen(request) as answer:
                    written += json.load(answer)["tokens"]
            return written

        return write

    return load


RUNTIMES = {
    "transformers": load_transformers,
    "onnxruntime": load_onnxruntime,
    "executorch": load_executorch,
    "llama.cpp": load_llama_cpp,
}


def memory_mib() -> float | None:
    """Return the most memory that this process has held, in MiB; None where the system does not tell.

    Not `getrusage`: its figure is at least that of the process that started this one.
    """
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024 if status.is_file() else None


def main() -> None:
    """Measure and print one line of JSON, the last of the output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("path", type=Path)
    parser.add_argument("prompts", type=Path, help="JSON: a list of lists of token ids")
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    args = parser.parse_args()
    prompts = json.loads(args.prompts.read_text(encoding="utf-8"))
    load = RUNTIMES[args.runtime](args.path)
    before = memory_mib()
    began = time.perf_counter()
    write = load()
    load_s = time.perf_counter() - began
    tokens = [write(ids, args.max_tokens) for ids in prompts]
    seconds = []
    for _ in range(args.rounds):
        began = time.perf_counter()
        for ids in prompts:
            write(ids, args.max_tokens)
        seconds.append(time.perf_counter() - began)
    after = memory_mib()
    added = None if before is None or after is None else after - before
    print(
        json.dumps({"load_s": load_s, "seconds": seconds, "memory_mib": after, "added_mib": added, "tokens": tokens})
    )


if __name__ == "__main__":
    main()
