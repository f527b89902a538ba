"""The data card and the Croissant metadata of a finished cleaning.

The card is ``README.md`` as the Hub takes it, for a person: licenses, sources, counts before and after each filter,
languages, how often people are spoken of, samples. ``croissant.json`` says the same to machines, with a checksum of
every file. Every figure comes from the run; what nobody said is "not stated".
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from deepseek_records.run_folder import write_json, write_text
from deepseek_records.summary import Summary

CARD_FILE, CROISSANT_FILE = "README.md", "croissant.json"
_SAMPLE_CHARACTERS = 240
# Words that speak of people, by group. A count says who is spoken of how often, and no more.
TERMS = {
    "women": ("woman", "women", "girl", "girls", "she", "her", "female"),
    "men": ("man", "men", "boy", "boys", "he", "his", "male"),
    "old": ("elderly", "aged", "older", "seniors"),
    "young": ("child", "children", "infants", "young", "adolescents"),
    "black": ("black", "african"),
    "white": ("white", "caucasian"),
    "asian": ("asian", "chinese", "indian", "japanese"),
    "hispanic": ("hispanic", "latino", "latina"),
    "muslim": ("muslim", "muslims", "islam"),
    "christian": ("christian", "christians", "church"),
    "jewish": ("jew", "jews", "jewish"),
    "gay or lesbian": ("gay", "lesbian", "homosexual", "transgender"),
    "disabled": ("disabled", "disability", "wheelchair"),
    "\u5973": ("\u5973",),
    "\u7537": ("\u7537",),
}
_ABOUT_ROWS = """Cleaned by `deepseek-moe data`. Each row has its text, `id`, `source`, `file`, `line` and
`origin_sha256`, the first 16 digits of the SHA-256 of the text as it stood there. Settings are in `recipe.yaml`,
versions in `environment.json`, hashes of the sources in `counts.json`."""
_ABOUT_PEOPLE = """Documents that hold a word of the group. A count tells who is spoken of how often, not how."""
_LIMITS = """Personal data are masked by patterns and check digits: names stay unless `mask_names` is set, and what has
another form is not found. Near-duplicates are found by estimate. Toxicity is judged by classifiers of English and
Chinese."""
_GROUP_OF = {word: group for group, words in TERMS.items() for word in words}
_WORD = re.compile("[a-z]+|[\u5973\u7537]")


def count_terms(text: str) -> Counter[str]:
    """Return the groups of people that a text speaks of, each once.

    Args:
        text: A document.
    """
    return Counter({_GROUP_OF[word] for word in _WORD.findall(text.lower()) if word in _GROUP_OF})


def write_card(output: Path, summary: Summary, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write the card and the metadata.

    Args:
        output: The run folder, with its shards.
        summary: What the run ended with.
        samples: By filter, what it dropped or changed.
    """
    write_text(output / CARD_FILE, card_text(output.name, summary, samples))
    write_json(output / CROISSANT_FILE, croissant(output, summary))


def card_text(name: str, summary: Summary, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the card as Markdown with the Hub's metadata on top.

    Args:
        name: Of the data.
        summary: What the run ended with.
        samples: By filter, what it dropped or changed.
    """
    details = summary.details
    splits = sorted({str(use.split) for use in summary.data})
    kinds = {Path(path).name.partition(".")[2] for path in details["files"]}
    metadata = {
        "language": [code for code in details["languages"] if code not in ("none", "und")],
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": split, "path": f"data/{split}-*.{kind}"} for split in splits for kind in kinds
                ],
            }
        ],
    }
    columns = ("source", "split", "license", "from", "documents", "bytes", "languages")
    uses = [
        (one.name, one.split, one.license, one.source, one.num_rows, one.num_bytes, ", ".join(one.languages) or "-")
        for one in summary.data
    ]
    sections = {
        "Sources": _table(columns, uses),
        "Documents before and after each filter": _filter_table(details["filters"]),
        "By source and language": "Dropped, of those read.\n\n" + _group_table(details["filters"]),
        "Languages": _table(("language", "documents"), details["languages"].items()),
        "People spoken of": f"{_ABOUT_PEOPLE}\n\n" + _table(("group", "documents", "share"), _term_rows(details)),
        "Samples of what was dropped or changed": _sample_text(samples),
        "Limits": f"{_LIMITS}\n",
    }
    head = f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n\n# {name}\n\n{_ABOUT_ROWS}\n"
    return "\n".join([head, *(f"## {title}\n\n{text}" for title, text in sections.items())])


def _table(header: Sequence[str], rows: Any) -> str:
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join('---' for _ in header)} |"]
    lines += [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _filter_table(filters: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (one["name"], f"{one['num_in']:,}", f"{one['num_dropped']:,}", f"{one['num_in'] - one['num_dropped']:,}",
         ", ".join(f"{kind} {count:,}" for kind, count in one["changes"].items()) or "-")
        for one in filters
    ]  # fmt: skip
    return _table(("filter", "before", "dropped", "after", "changed"), rows)


def _group_table(filters: Sequence[Mapping[str, Any]]) -> str:
    # The language is known from the second filter on; what had no text has none.
    read: Counter[str] = Counter(filters[0]["reached"]) if filters else Counter()
    rows = []
    for group, count in sorted(read.items()):
        told = (f"{one['name']} {one['dropped'][group]:,}" for one in filters if one["dropped"].get(group))
        rows.append((group, f"{count:,}", ", ".join(told) or "none"))
    return _table(("source / language", "read", "dropped"), rows)


def _term_rows(details: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    total = max(1, sum(details["kept"].values()))
    return [(group, f"{count:,}", f"{count / total:.1%}") for group, count in details["people"].items()]


def _sample_text(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    lines = []
    for name, rows in samples.items():
        for row in rows[:2]:
            text = _cell(row["text"][:_SAMPLE_CHARACTERS]).replace("`", "'")
            lines.append(
                f"- {name} ({_cell(row['why'])}), {row['source']}/{row['file']}, line {row['line']}: `{text}`"
            )
    return ("\n".join(lines) or "None.") + "\n"


def croissant(output: Path, summary: Summary) -> dict[str, Any]:
    """Return the metadata of the shards in Croissant's format, with checksums.

    Args:
        output: The run folder.
        summary: What the run ended with.
    """
    import mlcroissant as mlc

    files, sets = [], []
    for path, sha256 in summary.details["files"].items():
        kind = "application/x-parquet" if path.endswith(".parquet") else "application/jsonlines"
        files.append(
            mlc.FileObject(
                id=path,
                name=Path(path).name,
                content_url=path,
                content_size=f"{(output / path).stat().st_size} B",
                encoding_formats=[kind],
                sha256=sha256,
            )
        )
        fields = [
            mlc.Field(
                id=f"{path}/{column}",
                name=column,
                data_types=[mlc.DataType.INTEGER if column == "line" else mlc.DataType.TEXT],
                source=mlc.Source(file_object=path, extract=mlc.Extract(column=column)),
            )
            for column in ("text", "id", "source", "file", "line", "origin_sha256", "language", "split")
        ]
        sets.append(mlc.RecordSet(id=f"rows/{path}", name=Path(path).name.split(".")[0], fields=fields))
    masked = {one["name"]: one["changes"] for one in summary.details["filters"]}.get("personal_data", {})
    metadata = mlc.Metadata(
        name=re.sub(r"\W+", "-", output.name),
        description=f"Text cleaned by deepseek-moe data, from {', '.join(sorted(summary.details['read']))}.",
        license=sorted({use.license for use in summary.data}),
        url=next((use.source for use in summary.data if use.source.startswith("http")), None),
        in_language=[code for code in summary.details["languages"] if code not in ("none", "und")],
        distribution=files,
        record_sets=sets,
        data_preprocessing_protocol=[
            f"{one['name']}: {one['num_in']} documents, {one['num_dropped']} dropped, {one['num_changed']} changed"
            for one in summary.details["filters"]
        ],
        data_biases=[
            f"documents that speak of {group}: {count}" for group, count in summary.details["people"].items()
        ],
        personal_sensitive_information=[f"masked {kind}: {count}" for kind, count in masked.items()]
        or ["none masked"],
    )
    value: dict[str, Any] = json.loads(json.dumps(metadata.to_json(), default=str))
    return value
