"""The documents as Markdown, JSON and HTML.

`read_documents` fills the fields; `write_documents` writes them, after a last look for secrets and local paths.
A Markdown file that somebody edited since is never written over.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deepseek_model_cards.card.hand_edits import is_edited, sign
from deepseek_model_cards.card.markdown_cells import escape_cell
from deepseek_model_cards.eu.answers import read_answers
from deepseek_model_cards.eu.entries import Entry, Status, fill_field
from deepseek_model_cards.eu.fields import DOCUMENTS, HIGH_RISK, Form, Section, read_forms
from deepseek_model_cards.eu.run_records import RunRecords, read_records
from deepseek_records.leaks import find_leaks, scrub
from deepseek_records.output_paths import check_output, make_output
from deepseek_records.run_folder import write_text

FORMAT = 1
TEMPLATES = Path(__file__).parent / "templates"
STYLE = Path(__file__).parents[1] / "report" / "templates"
NOTICE = (
    "Written by deepseek-moe from the records of a run and the provider's own answers. This is not legal advice: "
    "whether the law applies, and whether a field says enough, is for the provider to judge."
)
_SHOWN = {Status.OPEN: "To be filled in by you", Status.PART: "Still to be filled in by you"}


@dataclass(frozen=True)
class Document:
    """One document.

    Args:
        name: ``technical``, ``summary`` or ``high_risk``.
        form: Its fields.
        entries: By key, each field filled.
    """

    name: str
    form: Form
    entries: dict[str, Entry]

    def section_entries(self, section: Section) -> list[Entry]:
        """Return the filled fields of a section.

        Args:
            section: One of the form's.
        """
        return [self.entries[field.key] for field in section.fields]


@dataclass(frozen=True)
class Documents:
    """All documents on one model.

    Args:
        records: What they were filled from.
        answers: The provider's answers.
        documents: By name.
    """

    records: RunRecords
    answers: Mapping[str, Any]
    documents: dict[str, Document]

    @property
    def entries(self) -> list[tuple[Document, Entry]]:
        """Every field with its document; a question that two documents ask is in both."""
        return [(one, entry) for one in self.documents.values() for entry in one.entries.values()]

    @property
    def missing(self) -> list[tuple[Document, Entry]]:
        """The fields that the law asks for and that are open, or open in part."""
        return [(one, entry) for one, entry in self.entries if entry.is_missing]

    @property
    def contradictions(self) -> dict[str, str]:
        """By field, why its answer does not agree with a file."""
        return {entry.field.key: entry.contradiction for _, entry in self.entries if entry.contradiction}

    @property
    def notes(self) -> list[str]:
        """What a reader must know of the records as a whole."""
        records = self.records
        lines = [f"{name} is not used: {why}." for name, why in records.left_out.items()]
        lines += [
            f"{name}: it is not known whether it measured these weights; {why}."
            for name, why in records.not_compared.items()
        ]
        lines += [f"{name} was begun and not finished; nothing of it is used." for name in records.unfinished]
        if records.missing_past:
            lines.append(f"Not recorded here: {records.missing_past}.")
        elif records.base:
            lines.append(
                f"The model was made from {records.base}. The training is documented from there on (recital 109); for "
                "what came before see that model's own documents."
            )
        return lines


def read_documents(
    run_path: str | Path, answers: str | Path | None = None, *, is_high_risk: bool = False
) -> Documents:
    """Return the documents of a run's model, filled as far as files and answers go.

    Args:
        run_path: A stage's folder, the parent of several, or a model's folder without a run.
        answers: The provider's answers, a YAML file.
        is_high_risk: Whether to document a high-risk system too.

    Raises:
        FileNotFoundError: There is neither a finished run nor a model, or no such file of answers.
        ValueError: A file cannot be read, or an answer is refused.
    """
    records = read_records(run_path)
    given = {} if answers is None else read_answers(answers, records, is_high_risk=is_high_risk)
    records = replace(records, is_base_told=bool(given.get("model_dependencies")))
    names = (*DOCUMENTS, HIGH_RISK) if is_high_risk else DOCUMENTS
    documents = {}
    for name in names:
        form = read_forms()[name]
        documents[name] = Document(name, form, {one.key: fill_field(one, records, given) for one in form.fields})
    return Documents(records, given, documents)


def write_documents(documents: Documents, output: str | Path) -> list[Path]:
    """Write each document as Markdown, JSON and HTML, and return the files.

    Args:
        documents: What `read_documents` gave.
        output: The folder.

    Raises:
        FileExistsError: A document with somebody's edits lies there.
        ValueError: A document would hold a secret or a local path.
    """
    folder = check_output(output)
    texts: dict[Path, str] = {}
    for one in documents.documents.values():
        place = folder / one.form.file
        _refuse_edited(place)
        texts[place.with_suffix(".md")] = sign(_render(documents, one, "document.md"))
        texts[place.with_suffix(".json")] = json.dumps(to_json(documents, one), indent=2, ensure_ascii=False) + "\n"
        texts[place.with_suffix(".html")] = _render(documents, one, "document.html")
    folders = [documents.records.root.resolve(), Path.home()]
    for path, text in texts.items():
        if leaks := find_leaks(text.encode(), is_text=True, folders=[one for one in folders if len(one.parts) > 1]):
            raise ValueError(f"document: {path.name} would hold {'; '.join(leaks)}; nothing was written")
    make_output(folder)
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def _refuse_edited(place: Path) -> None:
    page = place.with_suffix(".md")
    is_ours = page.is_file() and not page.is_symlink() and not is_edited(page.read_text("utf-8", errors="replace"))
    there = [path for path in (place.with_suffix(end) for end in (".md", ".json", ".html")) if path.exists()]
    if there and not is_ours:
        raise FileExistsError(
            f"OUT: got {there[0]}, which holds edits or was not written by this command, expected no such file; "
            "move it away or pass another folder, and put your own words into --answers"
        )


def to_json(documents: Documents, document: Document) -> dict[str, Any]:
    """Return a document for machines.

    Args:
        documents: All of them.
        document: One of them.
    """
    return {
        "format": FORMAT,
        "document": document.name,
        "title": document.form.title,
        "law": document.form.law,
        "notice": NOTICE,
        "model": model_title(documents),
        "notes": documents.notes,
        "fields": [_entry_json(entry) for entry in document.entries.values()],
    }


def _entry_json(entry: Entry) -> dict[str, Any]:
    field = entry.field
    sources = [
        {"text": one.text, "from": [{"file": source.file, "keys": list(source.keys)} for source in one.sources]}
        for one in entry.found.findings
    ]
    return {
        "key": field.key,
        "title": field.title,
        "law": list(field.law),
        "asks": field.asks,
        "required": field.required,
        "status": str(entry.status),
        "missing": entry.is_missing,
        "from_files": sources,
        "stated": entry.found.states or None,
        "answer": entry.answer_text or None,
        "answered_by": entry.answered_by or None,
        "to_be_filled_in": entry.wants or None,
        "contradiction": entry.contradiction or None,
    }


def model_title(documents: Documents) -> str:
    """Return what the model is called on the page: the provider's name for it, else the folder's.

    Args:
        documents: All documents.
    """
    return str(documents.answers.get("model_name") or scrub(documents.records.root.resolve().name))


def _render(documents: Documents, document: Document, template: str) -> str:
    import jinja2

    is_page = template.endswith(".html")
    # autoescape: texts of a run and of the provider must not become markup.
    environment = jinja2.Environment(
        autoescape=is_page,
        loader=jinja2.FileSystemLoader([TEMPLATES, STYLE]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["words"] = (lambda text: text) if is_page else escape_cell
    missing = sum(entry.is_missing for entry in document.entries.values())
    return environment.get_template(template).render(
        document=document,
        form=document.form,
        sections=[(section, document.section_entries(section)) for section in document.form.sections],
        model=model_title(documents),
        notice=NOTICE,
        notes=documents.notes,
        shown=_SHOWN,
        status=Status,
        missing=missing,
        required=sum(field.required for field in document.form.fields),
    )
