"""What every model's process in Triton does: settings, device, strings, and an end with the server.

Imported by the models that the stub of the Python back-end loads, and nowhere else.
"""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

RUN_VARIABLE = "DEEPSEEK_MOE_TRITON_RUN"
_LOOK_S = 0.5


def begin_stub(args: dict[str, Any]) -> None:
    """Tie this process's life to the server's, and show how often this model was brought back.

    Args:
        args: From Triton.
    """
    parent = os.getppid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    run = os.environ.get(RUN_VARIABLE)
    counts = Path(run, "restarts.json") if run else None
    number = json.loads(counts.read_text())[args["model_name"]] if counts is not None and counts.is_file() else 0
    family = pb_utils.MetricFamily(
        name="deepseek_moe_model_restarts",
        description="How often the supervisor brought a model back",
        kind=pb_utils.MetricFamily.GAUGE,
    )
    family.Metric(labels={"model": args["model_name"]}).set(number)
    _KEPT.append(family)


class LiveCount:
    """How many requests a decoupled model has not answered yet, where the supervisor can read it after a sudden death.

    Args:
        args: From Triton.
    """

    def __init__(self, args: dict[str, Any]) -> None:
        run = os.environ.get(RUN_VARIABLE)
        self._file = open(Path(run, f"{args['model_name']}.live"), "wb", buffering=0) if run else None  # noqa: SIM115
        self._number = 0
        self.add(0)

    def add(self, number: int) -> None:
        """Count requests that have come, or gone."""
        self._number += number
        if self._file is not None:
            os.pwrite(self._file.fileno(), f"{self._number:9}".encode(), 0)


_KEPT: list[Any] = []  # a family that nobody holds is taken out of the metrics


def read_settings(args: dict[str, Any]) -> dict[str, Any]:
    """Return what `write_repository` wrote for this model.

    Args:
        args: From Triton.
    """
    path = Path(args["model_repository"], args["model_version"], "settings.json")
    return json.loads(path.read_text(encoding="utf-8"))


def device_of(args: dict[str, Any]) -> str:
    """Return torch's name of the device that Triton chose.

    Args:
        args: From Triton.
    """
    return f"cuda:{args['model_instance_device_id']}" if args["model_instance_kind"] == "GPU" else "cpu"


def string_tensor(name: str, values: list[Any]) -> Any:
    """Return a tensor of strings.

    Args:
        name: The output.
        values: Nested lists of strings.
    """
    encoded = np.vectorize(str.encode, otypes=[np.object_])(np.array(values, dtype=np.object_))
    return pb_utils.Tensor(name, encoded)


def _end_with(parent: int) -> None:
    """End when the server has gone: a thread of the model's would otherwise keep this process."""
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os._exit(1)
