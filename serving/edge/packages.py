"""What the exports to other runtimes need beyond the package: imported where it is used, and named where absent."""

import importlib
from types import ModuleType

_EDGE = ("onnx", "onnxscript", "onnxruntime")


def check_packages(form: str) -> None:
    """Refuse to begin an export without what it needs.

    Args:
        form: As after ``--to``.

    Raises:
        ValueError: A package is not installed.
    """
    if form == "executorch":
        check_executorch()
    else:
        check_onnx_packages()


def check_onnx_packages() -> None:
    """Refuse to begin an export without the packages of the extra ``edge``.

    Raises:
        ValueError: One of them is not installed.
    """
    for name in _EDGE:
        _import(name)


def import_onnxruntime() -> ModuleType:
    """Return onnxruntime.

    Raises:
        ValueError: It is not installed.
    """
    return _import("onnxruntime")


def check_executorch() -> None:
    """Refuse to begin without ExecuTorch.

    Raises:
        ValueError: It is not installed.
    """
    try:
        importlib.import_module("executorch.runtime")
    except ImportError as error:
        raise ValueError(
            f"--to executorch: got an environment without executorch ({error}), expected the extra executorch; "
            "install it with: pip install 'deepseek-moe[executorch]'"
        ) from None


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"--to onnx, --to browser: got an environment without {name}, expected the extra edge; install it with: "
            "pip install 'deepseek-moe[edge]'"
        ) from None
