"""Where and with what a run was made: versions, seed, commit, command line, machine and start time.

`RunFolder.create` writes it as ``environment.json``. It holds no environment variable, for these may be secrets.
"""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

_DISTRIBUTIONS = (
    "deepseek-moe",
    "torch",
    "triton",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "datasets",
    "evaluate",
    "tokenizers",
    "huggingface_hub",
    "numpy",
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine, as far as the operating system tells.

    Args:
        system: For example ``Linux``.
        processor: For example ``x86_64``.
        num_cpus: CPU cores.
        gpus: The names of the GPUs that torch sees.
    """

    system: str | None = None
    processor: str | None = None
    num_cpus: int | None = None
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where and with what a run was made; None where it was not recorded.

    Args:
        command: The subcommand.
        argv: The command line, program name first.
        seed: The run's seed, if it has one.
        commit: The commit of the source tree; None for an installed wheel.
        versions: Versions by distribution, and ``python``.
        machine: The machine.
        started: Local time with its offset, ISO 8601.
    """

    command: str | None = None
    argv: tuple[str, ...] = ()
    seed: int | None = None
    commit: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Machine = field(default_factory=Machine)
    started: str | None = None


def describe_environment(command: str, seed: int | None = None) -> Environment:
    """Return the environment of this process.

    Args:
        command: The subcommand.
        seed: The seed of the run, if it has one.
    """
    versions = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return Environment(
        command=command,
        argv=(Path(sys.argv[0]).name, *sys.argv[1:]),
        seed=seed,
        commit=_git_commit(),
        versions=versions,
        machine=Machine(
            system=platform.system(), processor=platform.machine(), num_cpus=os.cpu_count(), gpus=_name_gpus()
        ),
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )


def _name_gpus() -> tuple[str, ...]:
    """Names of the GPUs; a process that has not imported torch uses none, and is not made to."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _git_commit() -> str | None:
    """The commit of the source tree this file lies in; None outside a checkout (an installed wheel)."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
