"""Upload of a run to the Hub: one atomic commit of weights, tokenizer, code, card, results and report.

`collect_files` lists what would be sent, `check_leaks` is the gate, `push_run` sends. It sends an allow-list only, so
a stray pickle, log or environment file in a run stays at home. Large files go up first and the commit comes last: an
interrupted upload leaves the repository as it was, and running it again sends only the files that are missing.
"""

import fnmatch
import json
import mmap
import tempfile
from dataclasses import dataclass
from pathlib import Path

from deepseek_model_cards.card.card import PICTURE, write_card
from deepseek_model_cards.report.report import write_report
from deepseek_model_cards.wording import format_bytes
from deepseek_records.leaks import find_leaks
from deepseek_records.lineage import read_lineage
from modeling_deepseek.checkpoint_check import read_weight_map

MODEL_FILES = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.py"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "adapter_config.json"),
)
# Vocabularies hold paths and token-like strings by nature; in them and in weights only exact local values are sought.
OPAQUE_FILES = ("*.safetensors", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "*.png")
# Left over from an earlier upload these would be loaded in place of, or on top of, the new weights.
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
# transformers writes where a model was loaded from into these; it is of no use to others and is a local path here.
ORIGIN_KEYS = ("_name_or_path", "name_or_path")


@dataclass(frozen=True)
class UploadFile:
    """One file to send.

    Args:
        path_in_repo: Its name in the repository.
        content: A local file, or the bytes themselves where they are not what lies on disk.
    """

    path_in_repo: str
    content: Path | bytes

    @property
    def num_bytes(self) -> int:
        """The size in bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def push_run(
    run_path: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    license: str | None = None,
    template: str | Path | None = None,
    message: str = "Upload model, card and results",
    token: str | None = None,
    endpoint: str | None = None,
    dry_run: bool = False,
) -> tuple[list[UploadFile], str | None]:
    """Upload a run's model, card, results and report in one commit.

    Args:
        run_path: A stage's folder, or the parent of several.
        repo_id: ``user/name`` on the Hub; made if it does not exist.
        private: Make a new repository private; an existing one keeps its visibility.
        revision: The branch to commit to, made if it does not exist; the main branch by default.
        license: The license of the weights, as the Hub spells it.
        template: A Jinja template for the card in place of ours.
        message: The commit's message.
        token: The access token; by default the one `hf auth login` stored, or ``HF_TOKEN``.
        endpoint: The server; huggingface.co by default, or ``HF_ENDPOINT``.
        dry_run: Check and list, and contact nobody.

    Returns:
        What was or would be sent, and the commit's address (None for a dry run).

    Raises:
        ValueError: A malformed `repo_id`, something secret in a file, or the server's refusal, in one line.
        FileNotFoundError: There is no finished run, or it made no model.
    """
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as folder:
        files = collect_files(run_path, repo_id, license=license, template=template, folder=Path(folder))
        check_leaks(files, folders=[Path(run_path).resolve(), Path(folder), Path.home()])
        if dry_run:
            # What was written for the upload vanishes with the folder, so hand back its bytes.
            return [_detach(file, Path(folder)) for file in files], None
        from deepseek_model_cards.hub.errors import one_line_errors

        with one_line_errors(repo_id):
            url = _commit(files, repo_id, private, revision, message=message, token=token, endpoint=endpoint)
        return [_detach(file, Path(folder)) for file in files], url


def check_repo_id(repo_id: str) -> None:
    """Refuse a repository id that is not ``user/name``.

    Args:
        repo_id: The id.

    Raises:
        ValueError: It is malformed.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(f"REPO: {repo_id!r} is no Hub id; pass user/name") from None
    if "/" not in repo_id:
        raise ValueError(f"REPO: {repo_id!r} names no owner; pass user/name")


def collect_files(
    run_path: str | Path, repo_id: str, *, license: str | None, folder: Path, template: str | Path | None = None
) -> list[UploadFile]:
    """Return everything that belongs into the repository, card and report freshly written.

    Args:
        run_path: A stage's folder, or the parent of several.
        repo_id: The repository, named in the card's loading examples.
        license: The license of the weights.
        folder: An empty folder that card and report are written into.
        template: A Jinja template for the card in place of ours.

    Raises:
        FileNotFoundError: There is no finished run, or it made no model.
    """
    model_path = read_lineage(run_path).model_path
    if model_path is None:
        raise FileNotFoundError(f"run: {run_path} made no model, so there is nothing to upload")
    check_weights(model_path)
    write_card(run_path, output=folder, license=license, repo_id=repo_id, template=template)
    write_report(run_path, folder / "report.html")
    names = ["README.md", PICTURE, "report.html"]
    written = [path for path in sorted(folder.rglob("*")) if path.name in names or path.parent.name == ".eval_results"]
    files = [UploadFile(str(path.relative_to(folder)), path) for path in written]
    for path in sorted(model_path.iterdir()):
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in MODEL_FILES):
            files.append(UploadFile(path.name, drop_origin(path) or path))
    return files


def check_weights(model_path: Path) -> None:
    """Refuse a model without weights, or without a shard that its index names.

    Args:
        model_path: The model's folder.

    Raises:
        FileNotFoundError: Something is missing.
    """
    present = {path.name for path in model_path.glob("*.safetensors")}
    wanted: set[str] = set()
    for index in model_path.glob("*.safetensors.index.json"):
        wanted |= set(read_weight_map(index).values())
    if missing := sorted(wanted - present):
        raise FileNotFoundError(f"run: {model_path} lacks {missing[0]}, which its index names")
    if not present:
        raise FileNotFoundError(f"run: {model_path} holds no weights (*.safetensors)")


def drop_origin(path: Path) -> bytes | None:
    """Return a JSON file without the keys that name where the model was loaded from, None where it has none.

    Args:
        path: A file of a model's folder.
    """
    if path.suffix != ".json" or path.name in OPAQUE_FILES:
        return None
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict) or not any(key in value for key in ORIGIN_KEYS):
        return None
    kept = {key: inner for key, inner in value.items() if key not in ORIGIN_KEYS}
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def _detach(file: UploadFile, folder: Path) -> UploadFile:
    if isinstance(file.content, Path) and file.content.is_relative_to(folder):
        return UploadFile(file.path_in_repo, file.content.read_bytes())
    return file


def check_leaks(files: list[UploadFile], folders: list[Path]) -> None:
    """Refuse to send a file that holds a secret or names a local folder.

    Args:
        files: What would be sent.
        folders: Local folders that must not be named; the root folder is ignored, for it is in every path.

    Raises:
        ValueError: The first such file, with what was found in it but never the secret itself.
    """
    folders = [folder for folder in folders if len(folder.parts) > 1]
    for file in files:
        is_text = not any(fnmatch.fnmatch(file.path_in_repo, pattern) for pattern in OPAQUE_FILES)
        found = find_leaks(_view(file), is_text=is_text, folders=folders)
        if found:
            raise ValueError(f"push: {file.path_in_repo} holds {'; '.join(found)}; nothing was sent")


def _view(file: UploadFile) -> bytes | mmap.mmap:
    """The content without reading a checkpoint of many GiB into memory."""
    if isinstance(file.content, bytes) or file.num_bytes == 0:
        return file.content if isinstance(file.content, bytes) else b""
    with open(file.content, "rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def _commit(
    files: list[UploadFile],
    repo_id: str,
    private: bool,
    revision: str | None,
    *,
    message: str,
    token: str | None,
    endpoint: str | None,
) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(endpoint=endpoint, token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    operations = [
        CommitOperationAdd(file.path_in_repo, str(file.content) if isinstance(file.content, Path) else file.content)
        for file in files
    ]
    there = api.list_repo_files(repo_id, revision=revision)
    operations += [CommitOperationDelete(name) for name in stale_weights(there, files)]
    return api.create_commit(repo_id, operations, commit_message=message, revision=revision).commit_url


def stale_weights(there: list[str], files: list[UploadFile]) -> list[str]:
    """Return the weight files of an earlier upload that the new one does not replace.

    transformers takes ``model.safetensors`` before any shards, so a sharded model pushed over a whole one would load
    the old weights.

    Args:
        there: The repository's files.
        files: What is sent.
    """
    sent = {file.path_in_repo for file in files}
    return [name for name in there if name not in sent and any(fnmatch.fnmatch(name, kind) for kind in WEIGHT_FILES)]


def list_files(files: list[UploadFile]) -> str:
    """Return the files with their sizes as text for a terminal.

    Args:
        files: What was or would be sent.
    """
    width = max(len(file.path_in_repo) for file in files)
    lines = [f"{file.path_in_repo.ljust(width)}  {format_bytes(file.num_bytes):>10}" for file in files]
    total = format_bytes(sum(file.num_bytes for file in files))
    return "\n".join([*lines, f"{len(files)} files, {total}"])
