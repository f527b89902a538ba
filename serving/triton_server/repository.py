"""Writes a model repository: one folder for each kind of answer, with `config.pbtxt` and one line of Python.

`deepseek-moe serve MODEL --engine triton --write REPO` calls it. Any Triton server with the Python back-end and this
package in its Python loads what is written; nothing in it is absolute but the path of the checkpoint, which stands in
`settings.json` because Triton tells a model's parameters to its clients.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_SECOND_US = 1_000_000
# Of each kind: the class behind it, what goes in, and what comes out. Dimensions leave out the batch.
_TEXT = ("text", "TYPE_STRING", 1)
KINDS: dict[str, tuple[str, list[tuple[Any, ...]], list[tuple[Any, ...]]]] = {
    "score": (
        "batched_models.ScoreModel",
        [_TEXT, ("context", "TYPE_STRING", 1, "optional")],
        [("log_likelihood", "TYPE_FP32", 1), ("num_tokens", "TYPE_INT32", 1)],
    ),
    "embed": ("batched_models.EmbedModel", [_TEXT], [("embedding", "TYPE_FP32", -1)]),
    "reward": ("batched_models.RewardModel", [_TEXT], [("reward", "TYPE_FP32", 1)]),
    "safety": (
        "batched_models.SafetyModel",
        [_TEXT],
        [("scores", "TYPE_FP32", -1), ("label", "TYPE_STRING", 1)],
    ),
    "generate": (
        "generation_model.GenerationModel",
        [
            ("prompt", "TYPE_STRING", 1),
            ("max_tokens", "TYPE_INT32", 1, "optional"),
            ("temperature", "TYPE_FP32", 1, "optional"),
            ("top_p", "TYPE_FP32", 1, "optional"),
            ("seed", "TYPE_INT64", 1, "optional"),
            ("stop", "TYPE_STRING", -1, "optional"),
            ("stream", "TYPE_BOOL", 1, "optional"),
        ],
        [("text", "TYPE_STRING", 1), ("finish_reason", "TYPE_STRING", 1), ("completion_tokens", "TYPE_INT32", 1)],
    ),
}
_MODEL = '"""Loaded by Triton\'s Python back-end."""\n\nfrom deepseek_serving.triton_server.{module} import {name}\n\n'


@dataclass(frozen=True)
class BatchingSettings:
    """How Triton puts requests together; the generating model has a batch of its own.

    Attributes:
        max_batch: Requests in one execution; 1 switches batching off.
        queue_delay_ms: How long the first request of a batch waits for others.
        max_waiting: Requests in a model's queue for each priority; the next one is refused with UNAVAILABLE. None
            bounds nothing, knows neither priorities nor a time limit, and nobody waits in vain: where a queue has a
            bound, Triton's batcher is not woken by a request that comes while the model works, and looks again after
            half a second unless another one comes (`DynamicBatchScheduler::Enqueue` of its core).
        timeout_s: How long a request may wait.
    """

    max_batch: int = 32
    queue_delay_ms: float = 5.0
    max_waiting: int | None = 64
    timeout_s: float = 300.0


@dataclass(frozen=True)
class ServedModel:
    """What one folder of the repository serves.

    Attributes:
        kind: A key of `KINDS`, and the folder's name.
        checkpoint: A folder or a Hub id; or ``module:Class`` of a classifier with ``predict(texts)``, for safety.
        context: Tokens of one text; of prompt and answer together for generation.
        limits: For the generating engine's `Limits`, beside the context.
        trust_remote_code: Run code that lies in the checkpoint.
    """

    kind: str
    checkpoint: str
    context: int
    limits: dict[str, Any]
    trust_remote_code: bool = False


def write_repository(
    folder: str | Path, models: list[ServedModel], batching: BatchingSettings, *, is_gpu: bool = False
) -> Path:
    """Write the repository and return its path.

    Args:
        folder: New, empty, or a repository that this function wrote before.
        models: Each of another kind.
        batching: Of all models but the generating one.
        is_gpu: Whether the models run on a GPU.

    Raises:
        FileExistsError: Something else lies there.
    """
    root = Path(folder)
    if root.exists() and any(entry.name not in KINDS for entry in root.iterdir()):
        raise FileExistsError(f"--write: {root} holds other files, expected a new folder or one written by serve")
    for model in models:
        version = root / model.kind / "1"
        version.mkdir(parents=True, exist_ok=True)
        module, _, name = KINDS[model.kind][0].partition(".")
        (version / "settings.json").write_text(json.dumps(asdict(model), indent=2) + "\n", encoding="utf-8")
        (version / "model.py").write_text(
            _MODEL.format(module=module, name=name) + f"TritonPythonModel = {name}\n", encoding="utf-8"
        )
        config = format_config(model.kind, batching, is_gpu=is_gpu)
        (root / model.kind / "config.pbtxt").write_text(config, encoding="utf-8")
    return root


def format_config(kind: str, batching: BatchingSettings, *, is_gpu: bool) -> str:
    """Return the text of `config.pbtxt`.

    Args:
        kind: A key of `KINDS`.
        batching: Not used for generation.
        is_gpu: Whether the model runs on a GPU.
    """
    _, inputs, outputs = KINDS[kind]
    is_generation = kind == "generate"
    lines = [f'name: "{kind}"', 'backend: "python"', f"max_batch_size: {0 if is_generation else batching.max_batch}"]
    lines += [f"input [ {_describe(*field)} ]" for field in inputs]
    lines += [f"output [ {_describe(*field)} ]" for field in outputs]
    # Each further instance would be another copy of the weights.
    lines.append(f"instance_group [ {{ kind: {'KIND_GPU' if is_gpu else 'KIND_CPU'} count: 1 }} ]")
    if is_generation:
        lines.append("model_transaction_policy { decoupled: true }")
    else:
        lines.append(_format_batching(batching))
    return "\n".join(lines) + "\n"


def _describe(name: str, kind: str, size: int, optional: str = "") -> str:
    return f'{{ name: "{name}" data_type: {kind} dims: [ {size} ]{" optional: true" if optional else ""} }}'


def _format_batching(batching: BatchingSettings) -> str:
    """Two priorities: 1 goes first and is what the supervisor's own questions use, 2 is everybody else's."""
    preferred, delay = "", 0
    if batching.max_batch > 1:
        delay = round(batching.queue_delay_ms * 1000)
        sizes = [size for size in (4, 8, 16, 32, 64, 128) if size < batching.max_batch] + [batching.max_batch]
        preferred = f"  preferred_batch_size: [ {', '.join(map(str, sizes))} ]\n"
    begin = f"dynamic_batching {{\n{preferred}  max_queue_delay_microseconds: {delay}\n"
    if batching.max_waiting is None:
        return begin + "}"
    policy = (
        f"{{ timeout_action: REJECT default_timeout_microseconds: {round(batching.timeout_s * _SECOND_US)} "
        f"allow_timeout_override: true max_queue_size: {batching.max_waiting} }}"
    )
    return f"{begin}  priority_levels: 2\n  default_priority_level: 2\n  default_queue_policy {policy}\n}}"
