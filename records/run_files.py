"""Which files of a folder a run of ours writes, and how exactly these are deleted.

Called by `RunFolder.create` for ``--overwrite`` and for a run that only began. A folder is deleted only if its
``environment.json`` is one of ours and every file in it has a name that a run writes; one other file, a link or a
repository in it and nothing is touched.
"""

import fnmatch
import importlib.util
import json
import os
from pathlib import Path

from deepseek_records.environment import Environment
from deepseek_records.typed_json import from_json

RECIPE_FILE = "recipe.yaml"
ENVIRONMENT_FILE = "environment.json"
INPUTS_FILE = "inputs.json"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
LOCK_FILE = ".lock"
MODEL_FOLDER = "model"
# Of `deepseek-moe update`: below a run, and in the folder of one update.
UPDATES_FOLDER = "updates"
CURRENT_LINK = "current"
GATES_FILE = "gates.json"
REPLAY_FILE = "replay.npz"

_OWN_FILES = (
    *(RECIPE_FILE, ENVIRONMENT_FILE, INPUTS_FILE, METRICS_FILE, SUMMARY_FILE, LOCK_FILE),
    *("results.json", "results.csv", "table.txt", "curves.png", "before.json", "samples.jsonl", "samples_*.jsonl"),
    *("prompts_*.jsonl.gz", "report.html", "README.md", "block.png", "counts.json", "croissant.json", "*.partial"),
    *("explain.json", "explain.html", "media.html", GATES_FILE, REPLAY_FILE, "rolled_back.json"),
)
# What `save_pretrained`, `Trainer` and FSDP write into a model or a checkpoint.
_WEIGHT_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.distcp"),
    *(
        "config.json",
        "generation_config.json",
        "adapter_config.json",
        "*_state.json",
        "complete.json",
        "written_by.json",
    ),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("*.model", "*.tiktoken", "*.jinja", ".metadata", "latest", "zero_to_fp32.py", "README.md", "*.partial"),
    *("configuration_*.py", "modeling_*.py", "preprocessor_config.json", "events.out.tfevents.*"),
    *("processor_config.json", "written_by.json"),
)
_OWN_FOLDERS = {
    **{
        name: _WEIGHT_FILES
        for name in (
            *(MODEL_FOLDER, "checkpoints", "value_model", "reference", "adapter", "unsplit"),
            *("trained", "trained.partial", "candidates"),
        )
    },
    "plots": ("*.png", "*.svg"),
    "data": ("train-*", "validation-*"),
    "dropped": ("*.jsonl", "*.partial"),
    "work": ("part-*", "train-*", "validation-*"),
    ".eval_results": ("*.yaml",),
    "documents": ("technical_documentation.*", "training_content_summary.*", "high_risk_documentation.*"),
    "media": ("*.png", "*.wav"),
    # what `bench smaller` makes: run folders, checkpoints, graphs, and a teacher's cache
    "variants": (*_OWN_FILES, *_WEIGHT_FILES, "*.onnx", "*.png", "cache.json"),
}


def is_own_run(folder: Path) -> bool:
    """Tell whether a folder holds a run of ours: a recipe, and an environment that names our command and version.

    Args:
        folder: The folder.
    """
    if not (folder / RECIPE_FILE).is_file() or not (folder / ENVIRONMENT_FILE).is_file():
        return False
    try:
        value = json.loads((folder / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
        environment = from_json(Environment, value, ENVIRONMENT_FILE)
    except (ValueError, OSError):
        return False
    return environment.command is not None and "python" in environment.versions


def find_foreign(folder: Path) -> Path | None:
    """Return the first file below a run folder that no run of ours writes, None where there is none.

    Args:
        folder: The run folder. Links count as foreign and are not followed.
    """
    own_code = _own_code_files()
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_symlink() or ".git" in parts:
            return path
        if path.is_dir():
            if parts[0] not in _OWN_FOLDERS:
                return path
            continue
        patterns = _OWN_FILES if len(parts) == 1 else (*_OWN_FOLDERS[parts[0]], *own_code)
        if not any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns):
            return path
    return None


def _own_code_files() -> tuple[str, ...]:
    """The model code that `save_pretrained` copies into every checkpoint of ours."""
    source = importlib.util.find_spec("modeling_deepseek")  # found, not imported: that takes seconds
    return tuple(path.name for path in Path(source.origin).parent.glob("*.py")) if source and source.origin else ()


def delete_run(folder: Path, *, hint: str) -> None:
    """Delete the files of a run and the folder, after every one was found to be ours.

    Args:
        folder: The run folder.
        hint: What to do instead, the end of the error.

    Raises:
        FileExistsError: The folder holds no run of ours, a file that none writes, or the working directory.
    """
    resolved = folder.resolve()
    if resolved in (Path.cwd(), *Path.cwd().parents, Path.home().resolve()):
        raise FileExistsError(f"output: {folder} holds the working or the home directory; {hint}")
    if folder.is_symlink() or not is_own_run(folder):
        raise FileExistsError(f"output: {folder} is not empty and holds no run of ours; {hint}")
    foreign = find_foreign(folder)
    if foreign is not None:
        raise FileExistsError(
            f"output: {folder} holds {foreign.relative_to(folder)}, which no run writes, so nothing was deleted; "
            f"move it away, or {hint}"
        )
    for parent, folders, files in os.walk(folder, topdown=False):
        for name in files:
            Path(parent, name).unlink()
        for name in folders:
            Path(parent, name).rmdir()
    folder.rmdir()
