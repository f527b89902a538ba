"""What the records tell of the data: sets, licenses, sources, counts, languages, cleaning, and the data cards.

Which category of the template a data set belongs to is for the provider to say (the answer ``data_categories``); a
source on the Hub or the web only stands against a "no".
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deepseek_model_cards.eu.contradictions import check_no, check_number
from deepseek_model_cards.eu.findings import Finding, Found, Source, one
from deepseek_model_cards.eu.run_records import RunRecords
from deepseek_records.cleaned_data import is_cleaning
from deepseek_records.json_files import read_object
from deepseek_records.leaks import scrub
from deepseek_records.run_folder import RECIPE_FILE
from deepseek_records.stages import Stage
from deepseek_records.summary import Cleaning, DataUse

CROISSANT_FILE = "croissant.json"
# The filters of `deepseek-moe data` that look for what should not be learned.
_UNSUITABLE = ("toxicity", "personal_data", "contamination", "quality", "language")
_BILLION = 10**9
_LARGE_SHARE = 0.03
# A source that others can look up.
_ADDRESS = re.compile(r"(?:https?://)?[\w-]+(?:\.[\w-]+)*\.[a-z]{2,}/\S+|https?://\S+")


def _name(row: DataUse) -> str:
    return f"{row.name}, {row.split}" if row.split else row.name


def _keys(place: int, row: DataUse, *names: str) -> tuple[str, ...]:
    return tuple(f"data.{place}.{name}" for name in names if getattr(row, name) not in (None, (), "not stated"))


def _per_set(
    records: RunRecords, describe: Callable[[DataUse], str], *names: str, is_training: bool = True
) -> list[Finding]:
    """One sentence per data set; a set read by two stages in the same way is named once for each."""
    found = []
    for stage in records.stages:
        for place, row in enumerate(stage.data):
            text = describe(row)
            if text and (row.used_for == "training") == is_training:
                keys = _keys(place, row, "name", "split", *names)
                found.append(one(f"{_name(row)} ({stage.name}): {text}", records.of_stage(stage), *keys))
    return found


def _past(records: RunRecords, *lacks: str) -> str:
    return "; ".join(filter(None, (*lacks, records.missing_past)))


def data_types(records: RunRecords) -> Found:
    """Return the modality of what the stages read."""
    findings = _per_set(records, lambda row: "text")
    senses = [name for name in ("vision_config", "audio_config") if records.facts.config.get(name)]
    other = "whether images or audio were among them" if senses else ""
    return Found(tuple(findings), _past(records, other) if findings else "")


def provenance(records: RunRecords) -> Found:
    """Return the source and the license of each data set."""

    def describe(row: DataUse) -> str:
        place = f"read from the Hub as {row.hub_id}; " if row.hub_id else ""
        return f"{place}source {row.source}; license {row.license}"

    findings = _per_set(records, describe, "source", "license", "hub_id")
    findings += [
        one(f"{source.name} within {name}: source {source.source}; license {source.license}", file, *keys)
        for name, source, file, keys in _cleaned_sources(records)
    ]
    return Found(tuple(findings), _past(records, "the category of each data set") if findings else "")


def _cleanings(records: RunRecords) -> Iterator[tuple[Stage, int, DataUse, Cleaning]]:
    for stage, place, row in records.training_data():
        if row.cleaning is not None:
            yield stage, place, row, row.cleaning


def _cleaned_sources(records: RunRecords) -> Iterator[tuple[str, Any, str, tuple[str, ...]]]:
    for stage, place, row, cleaning in _cleanings(records):
        for number, source in enumerate(cleaning.sources):
            if source.split not in (None, row.split):
                continue
            base = f"data.{place}.cleaning.sources.{number}"
            names = [key for key in ("name", "source", "license") if getattr(source, key) != "not stated"]
            yield _name(row), source, records.of_stage(stage), tuple(f"{base}.{key}" for key in names)


def obtained(records: RunRecords) -> Found:
    """Return where each data set was read, and how much the cleaning kept of each source."""
    findings = []
    for stage in records.stages:
        named = stage.settings.get("data")
        if isinstance(named, str):
            findings.append(one(f"{stage.name} read {named}", records.of_stage(stage, RECIPE_FILE), "data"))
        elif isinstance(named, list):
            for number, source in enumerate(named):
                if isinstance(source, dict) and (path := source.get("path") or source.get("data")):
                    key = f"data.{number}.{'path' if source.get('path') else 'data'}"
                    findings.append(one(f"{stage.name} read {path}", records.of_stage(stage, RECIPE_FILE), key))
    for stage, place, row, cleaning in _cleanings(records):
        for number, kept in enumerate(cleaning.sources):
            if kept.num_rows is not None and kept.split in (None, row.split):
                key = f"data.{place}.cleaning.sources.{number}.num_rows"
                text = f"cleaning kept {kept.num_rows:,} documents of {kept.name} in {_name(row)}"
                findings.append(one(text, records.of_stage(stage), key))
    return Found(tuple(findings), _past(records) if findings else "")


def data_points(records: RunRecords) -> Found:
    """Return the documents and bytes of each data set, for training and for measuring, and the tokens trained on."""

    def describe(row: DataUse) -> str:
        counts = [(row.num_rows, "documents or questions"), (row.num_bytes, "bytes of text")]
        return ", ".join(f"{count:,} {what}" for count, what in counts if count is not None)

    findings = _per_set(records, describe, "num_rows", "num_bytes")
    measured = _per_set(records, describe, "num_rows", "num_bytes", is_training=False)
    findings += [Finding(f"held out: {one.text}", one.sources) for one in measured]
    for stage in records.stages:
        if stage.summary is not None and stage.summary.num_training_tokens:
            tokens = f"{stage.summary.num_training_tokens:,} tokens trained on, repetitions counted ({stage.name})"
            findings.append(one(tokens, records.of_stage(stage), "num_training_tokens"))
    lacking = _sets_without(records, "num_rows")
    return Found(tuple(findings), _past(records, lacking) if findings else "")


def _sets_without(records: RunRecords, name: str) -> str:
    names = [row.name for _, _, row in records.training_data() if not getattr(row, name)]
    return f"those of {', '.join(dict.fromkeys(names))}" if names else ""


def scope(records: RunRecords) -> Found:
    """Return the languages of each data set."""
    return Found(tuple(_language_findings(records)))


def _language_findings(records: RunRecords) -> list[Finding]:
    findings = []
    for stage, place, row in records.training_data():
        if row.languages:
            keys = [f"data.{place}.languages.{number}" for number in range(len(row.languages))]
            text = f"{_name(row)} ({stage.name}): {', '.join(row.languages)}"
            findings.append(one(text, records.of_stage(stage), f"data.{place}.name", *keys))
    return findings


def languages(records: RunRecords) -> Found:
    """Return the ISO 639 codes of each data set; those that no record names are left open."""
    findings = _language_findings(records)
    return Found(tuple(findings), _past(records, _sets_without(records, "languages")) if findings else "")


def curation(records: RunRecords) -> Found:
    """Return what each filter of a cleaning dropped."""
    return Found(tuple(_filter_findings(records)), _past(records, _uncleaned(records)))


def _uncleaned(records: RunRecords) -> str:
    names = [row.name for _, _, row in records.training_data() if row.cleaning is None]
    return f"no run of `deepseek-moe data` cleaned {', '.join(dict.fromkeys(names))}" if names else ""


def _filter_findings(records: RunRecords, only: tuple[str, ...] = ()) -> list[Finding]:
    findings = []
    for stage, place, row, cleaning in _cleanings(records):
        for number, one_filter in enumerate(cleaning.filters):
            if not only or one_filter.name in only:
                base = f"data.{place}.cleaning.filters.{number}"
                text = (
                    f"{_name(row)}: the filter {one_filter.name} dropped {one_filter.num_dropped:,} of "
                    f"{one_filter.num_in:,} documents"
                )
                keys = [f"{base}.{name}" for name in ("name", "num_in", "num_dropped")]
                findings.append(one(text, records.of_stage(stage), *keys))
    return findings


def unsuitability(records: RunRecords) -> Found:
    """Return what the filters against toxic text, personal data and benchmark items did."""
    findings = _filter_findings(records, _UNSUITABLE)
    findings += _croissant_findings(records, "rai:personalSensitiveInformation")
    return Found(tuple(findings), _past(records, _uncleaned(records)))


def bias_measures(records: RunRecords) -> Found:
    """Return whom the cleaned data speaks of how often, and the model's results on tasks about bias."""
    findings = _croissant_findings(records, "rai:dataBiases")
    for measured, file, key in records.results():
        row = measured.result
        if row.measures == "bias":
            text = f"the trained model was measured on {row.label or row.dataset}: {row.value:.4g}"
            findings.append(one(text, file, f"{key}.value"))
    counts = any(finding.sources[0].file.endswith(CROISSANT_FILE) for finding in findings)
    return Found(tuple(findings), "how the data itself was looked at" if findings and not counts else "")


def _croissant_findings(records: RunRecords, key: str) -> list[Finding]:
    """What the metadata of a cleaning says, where its run still lies where the training read it."""
    findings = []
    for stage in records.stages:
        # As recorded, with the path: what a stage shows has none.
        for row in stage.run.summary.data:
            folder = Path(row.cleaning.run) if row.cleaning is not None else None
            if folder is None or not (folder / CROISSANT_FILE).is_file() or not is_cleaning(folder):
                continue
            values = read_object(folder / CROISSANT_FILE, "data").get(key) or []
            name = f"{folder.name}/{CROISSANT_FILE}"
            for place, value in enumerate([values] if isinstance(values, str) else values):
                findings.append(one(f"{row.name}: {scrub(str(value))}", name, f"{key}.{place}"))
    return list(dict.fromkeys(findings))


def data_size(records: RunRecords) -> Found:
    """Return the size of all training text; below a billion bytes it has fewer than a billion tokens."""
    sizes: dict[tuple[str, str | None], tuple[int, str, str]] = {}
    for stage, place, row in records.training_data():
        if row.num_bytes is not None:
            size = (row.num_bytes, records.of_stage(stage), f"data.{place}.num_bytes")
            sizes.setdefault((row.name, row.split), size)
    lacks = _past(records, _sets_without(records, "num_bytes"))
    if not sizes:
        return Found()
    total = sum(size for size, _, _ in sizes.values())
    sources = tuple(Source(file, (key,)) for _, file, key in sizes.values())
    text = f"{total:,} bytes of text in {len(sizes)} data sets"
    if total < _BILLION and not lacks:
        text = f"less than 1 billion tokens: {text}, and no token has less than a byte"
    elif not lacks:
        lacks = "the range in tokens"
    return Found((Finding(text, sources),), lacks, check_number(total, str(sources[0])))


def public_data(records: RunRecords) -> Found:
    """Return the data sets that anybody can look up; whether they count as public is for the provider to say."""
    rows = _public_rows(records)
    if not rows:
        return Found()
    findings = []
    for stage, place, row in rows:
        keys = _keys(place, row, "name", "split", "hub_id" if row.hub_id else "source")
        text = f"{_name(row)} can be looked up at {row.hub_id or row.source}"
        findings.append(one(text, records.of_stage(stage), *keys))
    stage, place, row = rows[0]
    check = check_no(f"{row.name} can be looked up", f"{records.of_stage(stage)}: data.{place}")
    return Found(tuple(findings), "whether you count them as public: yes or no", check)


def _public_rows(records: RunRecords) -> list[tuple[Stage, int, DataUse]]:
    """Data sets with an address, each once, however many stages read it."""
    rows: dict[tuple[object, ...], tuple[Stage, int, DataUse]] = {}
    for stage, place, row in records.training_data():
        if row.hub_id or _ADDRESS.search(row.source):
            rows.setdefault((row.name, row.split, row.hub_id, row.source), (stage, place, row))
    return list(rows.values())


def _by_share(records: RunRecords, is_large: bool) -> Found:
    rows = _public_rows(records)
    total = sum(row.num_bytes or 0 for _, _, row in rows)
    findings = []
    for stage, place, row in rows:
        # A set of unknown size is not called small.
        share = row.num_bytes / total if row.num_bytes is not None and total else None
        if (share is None or share > _LARGE_SHARE) == is_large:
            size = "size not recorded" if share is None else f"{share:.1%} of the public text"
            text = f"{_name(row)}: {size}, {row.hub_id or row.source}"
            keys = _keys(place, row, "name", "split", "hub_id" if row.hub_id else "source")
            findings.append(one(text, records.of_stage(stage), *keys))
    return Found(tuple(findings), "the period in which each was collected" if is_large and findings else "")


def public_large(records: RunRecords) -> Found:
    """Return the public data sets above 3 % of all public text, by bytes."""
    return _by_share(records, is_large=True)


def public_small(records: RunRecords) -> Found:
    """Return the smaller public data sets."""
    found = _by_share(records, is_large=False)
    if found.findings or not _by_share(records, is_large=True).findings:
        return found
    return Found(states="None: every public data set that is recorded is in the list of large ones.")


def teachers(records: RunRecords) -> Found:
    """Return the models whose outputs were learned from, as far as a recipe names them."""
    findings = [
        one(f"{stage.name} learned from {stage.settings['teacher']}", records.of_stage(stage, RECIPE_FILE), "teacher")
        for stage in records.stages
        if isinstance(stage.settings.get("teacher"), str)
    ]
    return Found(tuple(findings))
