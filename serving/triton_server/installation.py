"""Installs the server and finds it again: the binary of nvidia-pytriton and a Python of its own for the models.

    python -m deepseek_serving.triton_server.installation [FOLDER]      # what `make serve-setup` runs

The server starts each model in a process of its own, with the `python3` that it finds first on PATH. The one made here
sees everything that this environment has, and numpy 1.26 before it: under numpy 2 the process of server 2.51 dies at
the first text.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

FOLDER_VARIABLE = "DEEPSEEK_MOE_TRITON"
_DEFAULT = Path("build", "serving", "triton")
_SERVER, _NUMPY = "nvidia-pytriton==0.7.0", "numpy==1.26.4"
_PTH = "deepseek_moe_environment.pth"


@dataclass(frozen=True)
class Installation:
    """Where the server's parts are.

    Attributes:
        folder: With all of them.
    """

    folder: Path

    @property
    def server(self) -> Path:
        """The program."""
        return self._triton / "bin" / "tritonserver"

    @property
    def backends(self) -> Path:
        """The folder with the Python back-end."""
        return self._triton / "backends"

    @property
    def python(self) -> Path:
        """The environment whose `python3` runs the models."""
        return self.folder / "python"

    @property
    def stub(self) -> Path:
        """The program that the server starts for each model."""
        return self.backends / "python" / "triton_python_backend_stub"

    @property
    def _triton(self) -> Path:
        return self.folder / "server" / "pytriton" / "tritonserver"


def find_installation(folder: str | Path | None = None) -> Installation:
    """Return the installation.

    Args:
        folder: Where it is; None looks at the variable DEEPSEEK_MOE_TRITON, under the current folder, and beside the
            environment of this Python.

    Raises:
        ValueError: There is none, it is not whole, or it was made by another environment.
    """
    named = folder or os.environ.get(FOLDER_VARIABLE)
    places = [Path(named)] if named else [_DEFAULT, Path(sys.prefix).parent / _DEFAULT]
    found = next((place for place in map(Installation, places) if place.stub.is_file()), None)
    if found is None:
        raise ValueError(
            f"--engine triton: the server is not installed in {places[0]}; `make serve-setup`, or python -m "
            f"deepseek_serving.triton_server.installation FOLDER with {FOLDER_VARIABLE}=FOLDER, brings it"
        )
    found = Installation(found.folder.resolve())
    if _site_line() not in _pth_of(found).read_text(encoding="utf-8"):
        raise ValueError(
            f"--engine triton: {found.folder} was made by another Python environment; run make serve-setup in this one"
        )
    return found


def install(folder: Path) -> Installation:
    """Download and set up what is missing.

    Args:
        folder: Where to.

    Raises:
        ValueError: This Python's version has no counterpart in the server.
        subprocess.CalledProcessError: pip failed.
    """
    made = Installation(folder.resolve())
    pip = [sys.executable, "-m", "pip"]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    if not made.server.is_file():
        subprocess.run([*pip, "install", *quiet, "--target", str(made.folder / "server"), _SERVER], check=True)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = made.backends.parent / "python_backend_stubs" / version / made.stub.name
    if not stub.is_file():
        raise ValueError(f"python: got {version}, expected one that the server has a program for (3.8 to 3.13)")
    venv.create(made.python, symlinks=True)
    subprocess.run([*pip, "--python", str(made.python), "install", *quiet, _NUMPY], check=True)
    _pth_of(made).write_text(_site_line() + "\n", encoding="utf-8")
    shutil.copy2(stub, made.stub)  # last: its presence says that the rest is there
    made.stub.chmod(0o755)
    return made


def _site_line() -> str:
    # A line with the path alone would not run that folder's own .pth files, on which editable installs rest.
    return f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})"


def _pth_of(found: Installation) -> Path:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return found.python / "lib" / version / "site-packages" / _PTH


if __name__ == "__main__":
    print(f"the server is in {install(Path(sys.argv[1]) if len(sys.argv) > 1 else _DEFAULT).folder}")
