"""What of a run is sent to the Hub, and what stays at home and why.

Sent is an allow-list: the model's own files, and the card written from the run. Texts stay at home unless their owner
consents: the report with the samples goes only with `with_samples`, benchmark items never. Links that lead out of the
run are not followed.
"""

import fnmatch
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deepseek_model_cards.card.card import PICTURE, write_card
from deepseek_model_cards.card.hand_edits import is_edited
from deepseek_model_cards.card.license_facts import find_license
from deepseek_model_cards.card.metadata import is_hub_id
from deepseek_model_cards.card.model_facts import ModelFacts, read_facts
from deepseek_model_cards.hub.leak_check import UploadFile
from deepseek_model_cards.report.report import write_report
from deepseek_records.lineage import Lineage, read_lineage
from modeling_deepseek.checkpoint_check import read_weight_map

CARD, REPORT = "README.md", "report.html"
MODEL_FILES = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.py"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "adapter_config.json"),
)
# transformers writes where a model was loaded from into these; it is of no use to others and is a local path here.
ORIGIN_KEYS = ("_name_or_path", "name_or_path")
# Why a file of a run stays at home, by its name; the first pattern that fits.
_REASONS = (
    ("report.html", "holds prompts and what the model wrote; --with-samples sends a new one"),
    ("samples.jsonl", "holds prompts and what the model wrote; --with-samples sends a report with them"),
    ("samples_*.jsonl", "benchmark items with the model's answers; never sent"),
    ("prompts_*.jsonl.gz", "benchmark prompts; never sent"),
    ("summary.json", "holds prompts and what the model wrote; the card has the figures"),
    ("before.json", "holds held-out prompts and completions"),
    ("metrics.jsonl", "the run's log; the report draws it"),
    ("*.yaml", "a record of the run; the card has its recipe"),
    ("*.json", "a record of the run; the card has what of it is public"),
    ("checkpoints", "what training goes on from, not a finished model"),
    ("value_model", "the value model of the alignment, not the model"),
    ("reference", "the alignment's reference, not the model"),
    ("model", "a model on the way to the final one"),
    ("plots", "pictures of the training; the report draws them"),
)
_REWRITTEN = (CARD, PICTURE, ".eval_results", ".lock")
_NO_MODEL_FILE = "not on the list of a model's files"
_LINK = "a link out of the run; copy the file to send it"


@dataclass(frozen=True)
class HeldBack:
    """Something that is not sent.

    Args:
        path: Its place in the run.
        reason: Why it stays.
    """

    path: str
    reason: str


@dataclass(frozen=True)
class UploadPlan:
    """What would leave the machine.

    Args:
        files: What is sent.
        held_back: What is not.
        license: The license's id.
        is_card_edited: Whether the card is the run's own ``README.md`` with somebody's edits.
    """

    files: list[UploadFile]
    held_back: list[HeldBack]
    license: str
    is_card_edited: bool = False


def plan_upload(
    run_path: str | Path,
    repo_id: str,
    *,
    license: str | None,
    folder: Path,
    template: str | Path | None = None,
    with_samples: bool = False,
) -> UploadPlan:
    """Return what of a run is sent, its card freshly written.

    Args:
        run_path: A stage's folder, the parent of several, or a model's folder without a run.
        repo_id: The repository, named in the card's loading examples.
        license: The license of the weights; None takes the base model's or the edited card's, if it is known.
        folder: An empty folder that the card and the report are written into.
        template: A Jinja template for the card in place of ours.
        with_samples: Send the report with its prompts and completions.

    Raises:
        FileNotFoundError: There is no finished run, or it made no model.
        ValueError: The license is not known, or the model is not whole.
    """
    path = Path(run_path).resolve()
    lineage = read_lineage(path)
    model_path = lineage.model_path
    if model_path is None:
        raise FileNotFoundError(f"run: {run_path} made no model, so there is nothing to upload")
    if with_samples and not lineage.stages:
        raise ValueError(f"with_samples: got {run_path}, a model without a run, expected a run; it has no samples")
    facts = read_facts(model_path)
    edited = _edited_card(path)
    known = _check_license(license, lineage, facts, path if edited else None)
    model_files = [*_model_files(model_path, path.resolve())]
    check_weights(model_path, {file.path_in_repo for file in model_files})
    if facts.is_adapter and not (facts.base and is_hub_id(facts.base)):
        raise ValueError(
            "adapter_config.json: got a local base_model_name_or_path, expected a Hub id; upload the base model first "
            "and write its id there"
        )
    write_card(path, output=folder, license=license, repo_id=repo_id, template=template)
    if edited:
        (folder / CARD).write_text(edited, encoding="utf-8")
    if with_samples:
        write_report(path, folder / REPORT)
    names = [CARD, PICTURE, REPORT]
    written = [file for file in sorted(folder.rglob("*")) if file.name in names or file.parent.name == ".eval_results"]
    files = [UploadFile(str(file.relative_to(folder)), file) for file in written] + model_files
    sent = {file.path_in_repo for file in model_files}
    return UploadPlan(files, list(_held_back(path, model_path.resolve(), sent, with_samples)), known, bool(edited))


def _edited_card(path: Path) -> str:
    """The run's own card where somebody has written in it; it is sent as it is."""
    readme = path / CARD
    text = readme.read_text(encoding="utf-8") if readme.is_file() and not readme.is_symlink() else ""
    return text if text and is_edited(text) else ""


def _check_license(license: str | None, lineage: Lineage, facts: ModelFacts, edited: Path | None) -> str:
    base = facts.base or lineage.base
    stated = find_license(None, folder=edited, base=None).fields if edited else {}
    found = find_license(license, folder=edited or facts.path, base=base)
    if not found.is_known:
        raise ValueError(
            "license: got none, expected --license with an id of the Hub's such as apache-2.0; nobody may use an "
            "upload without one"
        )
    known = found.fields.get("license_name") or found.fields["license"]
    if edited and not stated:
        raise ValueError(f"license: got {known}, expected it in the edited {CARD}; write 'license: {known}' there")
    if edited and license is not None and license != stated["license"]:
        raise ValueError(f"license: got {license}, expected {stated['license']}, which the edited {CARD} states")
    return known


def _model_files(model_path: Path, root: Path) -> Iterator[UploadFile]:
    for file in sorted(model_path.iterdir()):
        if not any(fnmatch.fnmatch(file.name, pattern) for pattern in MODEL_FILES) or not file.is_file():
            continue
        if is_link_out(file, root):
            if fnmatch.fnmatch(file.name, "*config.json") or fnmatch.fnmatch(file.name, "*.safetensors*"):
                raise ValueError(f"model: got {file.name}, a link out of {root.name}, expected a file; copy it there")
            continue
        yield UploadFile(file.name, drop_origin(file) or file)


def is_link_out(path: Path, root: Path) -> bool:
    """Tell whether a path leads out of a folder.

    Args:
        path: The path.
        root: The folder, resolved.
    """
    return not path.resolve().is_relative_to(root)


def _held_back(path: Path, model_path: Path, sent: set[str], with_samples: bool) -> Iterator[HeldBack]:
    """What lies in the run and is not sent: files and folders of a stage, and what else lies in the model's folder."""
    root = path.resolve()
    pending = [path]
    for folder in pending:
        for entry in sorted(folder.iterdir()):
            name = str(entry.relative_to(path))
            if is_link_out(entry, root):
                yield HeldBack(name, _LINK)
            elif entry == model_path:
                pending.append(entry)
            elif folder == model_path:
                if entry.name not in sent and (entry.name not in _REWRITTEN or folder != path):
                    yield HeldBack(name, _NO_MODEL_FILE)
            elif entry.is_dir() and ((entry / "recipe.yaml").is_file() or entry == model_path.parent):
                pending.append(entry)
            elif entry.name not in _REWRITTEN and not (with_samples and entry.name == REPORT):
                yield HeldBack(name, _reason(entry.name))


def _reason(name: str) -> str:
    return next((reason for pattern, reason in _REASONS if fnmatch.fnmatch(name, pattern)), _NO_MODEL_FILE)


def check_weights(model_path: Path, present: set[str]) -> None:
    """Refuse a model without weights, or without a shard that its index names.

    Args:
        model_path: The model's folder.
        present: The names of the files that would be sent.

    Raises:
        FileNotFoundError: Something is missing.
    """
    wanted: set[str] = set()
    for index in model_path.glob("*.safetensors.index.json"):
        wanted |= set(read_weight_map(index).values())
    if missing := sorted(wanted - present):
        raise FileNotFoundError(f"run: {model_path} lacks {missing[0]}, which its index names")
    if not any(name.endswith(".safetensors") for name in present):
        raise FileNotFoundError(f"run: {model_path} holds no weights (*.safetensors)")


def drop_origin(path: Path) -> bytes | None:
    """Return a JSON file without the keys that name where the model was loaded from, None where it has none.

    Args:
        path: A file of a model's folder.
    """
    if path.suffix != ".json" or path.name in ("tokenizer.json", "vocab.json"):
        return None
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict) or not any(key in value for key in ORIGIN_KEYS):
        return None
    kept = {key: inner for key, inner in value.items() if key not in ORIGIN_KEYS}
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()
