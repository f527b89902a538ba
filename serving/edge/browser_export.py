"""A checkpoint as a folder with one page that runs the model in a browser, through onnxruntime-web.

`deepseek-moe export --to browser` calls it. The page asks nobody but the server it came from: runtime and tokenizer
are copied beside it from npm's packages, which are fetched once.
"""

import dataclasses
import os
import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepseek_records.json_files import read_object
from deepseek_serving.edge.decoder_graph import check_exportable
from deepseek_serving.edge.export_folder import whole_folder, write_companions, write_report
from deepseek_serving.edge.measurement import Agreement, ProbeText
from deepseek_serving.edge.onnx_export import (
    GRAPHS,
    PACKAGES,
    check_size,
    describe_model,
    fill_readme,
    measure_graphs,
    write_graphs,
)
from deepseek_serving.edge.packages import check_onnx_packages

# Of each package of npm: its version, and the files of it that the page loads.
_RUNTIME = {
    "onnxruntime-web": (
        "1.30.0",
        ("dist/ort.wasm.min.mjs", "dist/ort-wasm-simd-threaded.mjs", "dist/ort-wasm-simd-threaded.wasm"),
    ),
    "@huggingface/tokenizers": ("0.2.0", ("dist/tokenizers.min.mjs",)),
}
# The graphs of the page; without a cache each token would cost as much as the whole text.
_GRAPHS = GRAPHS[:2]


def export_browser(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: str | Path,
    *,
    texts: Sequence[str],
    runtime: str | Path | None = None,
    most_gathered_gib: float = 1.0,
) -> dict[str, Agreement]:
    """Write a page, a model's graphs and its tokenizer.

    Args:
        model: A causal language model in fp32.
        tokenizer: Its tokenizer.
        output: The folder to write, empty or absent.
        texts: What the graphs are measured on, held out from training.
        runtime: The folder into which npm installed the runtime; None takes `default_runtime`.
        most_gathered_gib: The most memory for gathered experts' weights, in GiB.

    Returns:
        How far each graph is from the model.

    Raises:
        ValueError: A model that the graphs cannot express, or the runtime is absent.
        FileExistsError: The folder holds files.
    """
    check_onnx_packages()
    files = find_runtime(default_runtime() if runtime is None else Path(runtime).expanduser())
    check_exportable(model, most_gathered_gib)
    check_size(model)
    with whole_folder(output) as folder:
        write_companions(folder, model, tokenizer)
        facts = describe_model(model)
        write_graphs(model, folder, _GRAPHS)
        measured = measure_graphs(folder, ProbeText(model, tokenizer, texts), _GRAPHS)
        templates = resources.files(__package__).joinpath("templates")
        for part in templates.joinpath("browser").iterdir():
            (folder / part.name).write_bytes(part.read_bytes())
        (folder / "runtime").mkdir()
        for path in files:
            shutil.copyfile(path, folder / "runtime" / path.name)
        readme = templates.joinpath("browser.md").read_text(encoding="utf-8")
        (folder / "README.md").write_text(fill_readme(readme, facts, measured), encoding="utf-8")
        plain = {name: dataclasses.asdict(agreement) for name, agreement in measured.items()}
        write_report(folder, "browser", facts, plain, PACKAGES)
    return measured


def default_runtime() -> Path:
    """Return where the runtime is looked for: ``deepseek-moe/browser`` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepseek-moe" / "browser"


def find_runtime(folder: Path) -> list[Path]:
    """Return the runtime's files.

    Args:
        folder: Where npm installed it.

    Raises:
        ValueError: It is absent, not whole or of another version; the line says how to fetch it.
    """
    found = []
    for package, (version, files) in _RUNTIME.items():
        place = folder / "node_modules" / package
        there = (
            read_object(place / "package.json", "runtime").get("version")
            if (place / "package.json").is_file()
            else None
        )
        paths = [place / file for file in files]
        if there != version or not all(path.is_file() for path in paths):
            wanted = " ".join(f"{name}@{one}" for name, (one, _) in _RUNTIME.items())
            raise ValueError(
                f"--runtime: got {folder} with {'no' if there is None else there} {package}, expected {version}; "
                f"fetch it once with: npm install --prefix {folder} --ignore-scripts {wanted}"
            )
        found += paths
    return found
