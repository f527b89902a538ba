"""The wheel, the sdist's wheel and the editable install hold every subpackage and data file."""

import configparser
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "kernels": "deepseek_kernels",
    "modeling_deepseek": "modeling_deepseek",
    "records": "deepseek_records",
    "model_cards": "deepseek_model_cards",
    "training": "deepseek_training",
    "eval": "deepseek_eval",
    "serving": "deepseek_serving",
    "cli": "deepseek_cli",
}


def tracked_files() -> set[str]:
    """Every file git tracks in a package folder, under its installed name."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    names = set()
    for path in filter(None, listed):
        folder, rest = path.split("/", 1)
        if (ROOT / path).is_file():
            names.add(f"{FOLDERS[folder]}/{rest}")
    return names


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory) -> Path:
    """A copy of the checkout's files, so that building leaves nothing behind."""
    target = tmp_path_factory.mktemp("tree")
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    for path in filter(None, listed):
        source = ROOT / path
        if source.is_file():
            destination = target / path
            destination.parent.mkdir(parents=True, exist_ok=True)
            destination.write_bytes(source.read_bytes())
    return target


def build(source: Path, output: Path, kind: str) -> Path:
    """Build a wheel or an sdist with the setuptools of this environment, so that no network is needed."""
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(output), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(output.iterdir())


def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_wheel_holds_every_file(source_tree, tmp_path):
    assert wheel_names(build(source_tree, tmp_path / "wheel", "wheel")) == tracked_files()


@pytest.mark.slow
def test_wheel_from_sdist_holds_every_file(source_tree, tmp_path):
    sdist = build(source_tree, tmp_path / "sdist", "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    unpacked = next((tmp_path / "unpacked").iterdir())
    assert wheel_names(build(unpacked, tmp_path / "wheel", "wheel")) == tracked_files()


@pytest.mark.slow
def test_editable_install_finds_every_module():
    modules = sorted(
        name[: -len(".py")].replace("/", ".").removesuffix(".__init__")
        for name in tracked_files()
        if name.endswith(".py")
    )
    code = (
        "import importlib.util, sys\n"
        f"missing = [name for name in {modules!r} if importlib.util.find_spec(name) is None]\n"
        "sys.exit(' '.join(missing) or 0)"
    )
    # Not from the repository root: there the folders themselves could answer.
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_setup_cfg_lists_every_folder_with_code():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    present = {str(Path(name).parent).replace("/", ".") for name in tracked_files() if name.endswith(".py")}
    assert listed == present


def test_kernels_folder_stays_a_plain_folder():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_a_kernels_package_installed_beside_ours_is_found_from_the_root(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("NAME = 'the other one'\n")
    # The folder stands where site-packages would: behind the working directory on the path.
    code = "import kernels; assert kernels.NAME == 'the other one', kernels; import deepseek_kernels"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["training/data", "eval/data"])
def test_every_data_file_has_its_source_beside_it(folder):
    sources = (ROOT / folder / "SOURCES.md").read_text(encoding="utf-8")
    unnamed = [
        path.name
        for path in (ROOT / folder).iterdir()
        if path.suffix not in (".py", ".md", "") and path.name not in sources
    ]
    assert not unnamed


def test_embedded_data_stays_under_nine_megabytes():
    files = [path for folder in ("training/data", "eval/data") for path in (ROOT / folder).iterdir()]
    assert sum(path.stat().st_size for path in files) < 9_000_000
