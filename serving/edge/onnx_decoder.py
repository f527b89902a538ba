"""Runs an exported ONNX model in onnxruntime: logits of a text, and greedy text with the cache.

The export measures with it, tests and benchmarks compare with it. It needs numpy and onnxruntime only, as a device
would; the README beside an exported model holds the same loop in 20 lines.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_records.json_files import read_object
from deepseek_serving.edge.export_folder import REPORT_FILE
from deepseek_serving.edge.packages import import_onnxruntime

Past = list[np.ndarray]


class OnnxDecoder:
    """One graph with a cache.

    Args:
        path: The file.
        prompt_chunk: Prompt tokens to be read at once.
        num_threads: Of onnxruntime.
    """

    def __init__(self, path: Path, prompt_chunk: int, num_threads: int = 1) -> None:
        self.session = open_session(path, num_threads)
        self.prompt_chunk = prompt_chunk
        self.past_inputs = [one for one in self.session.get_inputs() if one.name.startswith("past_key_values.")]

    @classmethod
    def of_folder(cls, folder: Path, file: str = "model.onnx", num_threads: int = 1) -> "OnnxDecoder":
        """Return the decoder of an exported folder.

        Args:
            folder: What ``--to onnx`` wrote.
            file: The graph in it.
            num_threads: Of onnxruntime.

        Raises:
            FileNotFoundError: It holds no export.
        """
        report = read_object(folder / REPORT_FILE, "export")
        return cls(folder / file, report["model"]["prompt_chunk"], num_threads)

    def empty_past(self, batch_size: int = 1) -> Past:
        """Return a cache without tokens.

        Args:
            batch_size: B.
        """
        # Shapes are [batch, heads, past, width].
        return [np.zeros((batch_size, one.shape[1], 0, one.shape[3]), np.float32) for one in self.past_inputs]

    def step(self, ids: np.ndarray, attention_mask: np.ndarray, past: Past) -> tuple[np.ndarray, np.ndarray, Past]:
        """Read new tokens.

        Args:
            ids: `[B, S]` int64.
            attention_mask: `[B, P + S]` int64.
            past: The cache.

        Returns:
            Logits `[B, S, vocabulary]`, `expert_weights` `[L, B, S, E]`, and the cache with the new tokens.
        """
        feed: dict[str, Any] = {"input_ids": ids, "attention_mask": attention_mask}
        feed |= {one.name: tensor for one, tensor in zip(self.past_inputs, past, strict=True)}
        logits, expert_weights, *past = self.session.run(None, feed)
        return logits, expert_weights, past

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, Past]:
        """Return the logits `[S, vocabulary]` of a text `[S]`, read chunk by chunk, and the cache behind it.

        Args:
            ids: Token ids.
        """
        past, parts = self.empty_past(), []
        for begin in range(0, len(ids), self.prompt_chunk):
            chunk = ids[None, begin : begin + self.prompt_chunk]
            logits, _, past = self.step(chunk, np.ones((1, begin + chunk.shape[1]), np.int64), past)
            parts.append(logits[0])
        return np.concatenate(parts), past

    def generate(self, ids: Sequence[int], num_new: int, eos_token_ids: Sequence[int] = ()) -> list[int]:
        """Return the greedy continuation.

        Args:
            ids: The prompt's token ids, at least one.
            num_new: Most new tokens.
            eos_token_ids: What ends the text; it is returned too.
        """
        written: list[int] = []
        logits, past = self.read(np.asarray(ids, np.int64))
        while True:
            written.append(int(logits[-1].argmax()))
            if len(written) >= num_new or written[-1] in eos_token_ids:
                return written
            seen: np.ndarray = np.ones((1, len(ids) + len(written)), np.int64)
            batch, _, past = self.step(np.array([written[-1:]]), seen, past)
            logits = batch[0]


def open_session(path: Path, num_threads: int = 1) -> Any:
    """Return an `onnxruntime.InferenceSession` on the CPU.

    Args:
        path: The file.
        num_threads: Within an operator.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: onnxruntime does not read it.
    """
    runtime = import_onnxruntime()
    if not path.is_file():
        raise FileNotFoundError(f"model: got {path}, expected an ONNX file")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    try:
        return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no base class of their own
        raise ValueError(
            f"model: got {path}, expected an ONNX file that onnxruntime reads ({str(error)[:200]})"
        ) from None


def run_without_cache(session: Any, ids: np.ndarray) -> np.ndarray:
    """Return the logits `[B, S, vocabulary]` of a graph without cache.

    Args:
        session: From `open_session`.
        ids: `[B, S]` int64, without padding.
    """
    logits: np.ndarray = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
    return logits


def generate_without_cache(session: Any, ids: Sequence[int], num_new: int) -> list[int]:
    """Return the greedy continuation by a graph without cache, which reads the whole text for each token.

    Args:
        session: From `open_session`.
        ids: The prompt's token ids, at least one.
        num_new: New tokens.
    """
    text = list(ids)
    for _ in range(num_new):
        text.append(int(run_without_cache(session, np.array([text]))[0, -1].argmax()))
    return text[len(ids) :]
