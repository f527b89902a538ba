"""What a model's own files tell: hashes, architecture, inputs and outputs, size, license, and what it needs to run."""

import functools
import hashlib
from pathlib import Path
from typing import Any

from deepseek_model_cards.card.architecture import architecture_rows
from deepseek_model_cards.card.license_facts import find_license, read_license
from deepseek_model_cards.card.metadata import is_hub_id
from deepseek_model_cards.card.parameter_table import try_to_count
from deepseek_model_cards.eu.contradictions import check_names, check_not_before, check_number
from deepseek_model_cards.eu.findings import Finding, Found, Source, one
from deepseek_model_cards.eu.run_records import RunRecords
from deepseek_model_cards.wording import format_bytes, format_count
from deepseek_records.run_folder import ENVIRONMENT_FILE, RECIPE_FILE, SUMMARY_FILE

# The form's ranges, by their upper end.
_RANGES = ((5e8, "1 to 500M"), (5e9, "500M to 5B"), (1.5e10, "5B to 15B"), (5e10, "15B to 50B"), (1e11, "50B to 100B"))
_LARGE_RANGES = ((5e11, "100B to 500B"), (1e12, "500B to 1T"))
_SENSES = {"vision_config": "images", "audio_config": "audio"}
# Tokens of the task that inference is counted for.
TASK_TOKENS = 100_000


def weight_hashes(records: RunRecords) -> Found:
    """Return the SHA-256 of each file of weights."""
    folder = records.facts.path
    files = sorted(folder.glob("*.safetensors")) if folder else []
    hashes = {file.name: _sha256(file, file.stat().st_mtime_ns) for file in files}
    findings = [one(f"SHA-256 of {name}: {value}", records.of_model(name)) for name, value in hashes.items()]

    def check(answer: Any) -> str:
        named = [word for word in str(answer).lower().split() if len(word) == 64]
        wrong = any(word not in hashes.values() for word in named)
        return f"{', '.join(map(records.of_model, hashes))}: the hash is another" if wrong and hashes else ""

    return Found(tuple(findings), contradicts=check)


@functools.lru_cache(maxsize=64)
def _sha256(file: Path, time_ns: int) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def training_end(records: RunRecords) -> Found:
    """Return nothing to fill in; a date of release before the last stage began is told."""
    stage = records.stages[-1] if records.stages else None
    started = stage.environment.started if stage else None
    where = f"{records.of_stage(stage, ENVIRONMENT_FILE)}: started" if stage else ""
    return Found(contradicts=check_not_before(started, where))


def dependencies(records: RunRecords) -> Found:
    """Return the model that the first stage started from, and the teachers of later ones."""
    findings, names = [], []
    base = records.base
    stages = records.stages
    if base is not None and records.lineage.base and stages:
        key = "base_model" if stages[0].summary and stages[0].summary.base_model else "model"
        file = records.of_stage(stages[0]) if key == "base_model" else records.of_stage(stages[0], RECIPE_FILE)
        findings.append(one(f"made from {base}", file, key))
    elif base is not None:
        findings.append(
            one(f"an adapter of {base}", records.of_model("adapter_config.json"), "base_model_name_or_path")
        )
    elif stages:
        is_named = bool(stages[0].environment.command)
        file, key = (ENVIRONMENT_FILE, "command") if is_named else (SUMMARY_FILE, "stage")
        findings.append(one("N/A: made from scratch", records.of_stage(stages[0], file), key))
    if base is not None:
        names.append(base)
    for stage in stages:
        teacher = stage.settings.get("teacher")
        if isinstance(teacher, str):
            findings.append(
                one(f"taught by {teacher} ({stage.name})", records.of_stage(stage, RECIPE_FILE), "teacher")
            )
            names.append(teacher)
    if not findings:
        return Found()
    lacks = records.missing_past
    if base is not None and not lacks:
        lacks = "its version, and whether it was placed on the Union market"
    # A local folder may be called anything; a Hub id must be named.
    known = [name for name in names if is_hub_id(name)]
    where = str(findings[0].sources[0])
    return Found(tuple(findings), lacks, check_names(known, where) if known else None)


def architecture(records: RunRecords) -> Found:
    """Return the architecture in a sentence."""
    facts = records.facts
    if facts.is_adapter:
        kind = str(facts.adapter.get("peft_type", "PEFT"))
        return Found((one(f"an adapter ({kind})", records.of_model("adapter_config.json"), "peft_type"),))
    if not facts.config:
        return Found()
    name = ", ".join(map(str, facts.config.get("architectures") or [facts.model_type]))
    experts = ", a decoder with a mixture of experts" if facts.num_routed_experts else ""
    text = f"transformer of type {facts.model_type} ({name}){experts}"
    return Found((one(text, records.of_model("config.json"), "model_type", "architectures.0"),))


def design(records: RunRecords) -> Found:
    """Return the rows of the card's table on the architecture."""
    rows = architecture_rows(records.facts, None)
    file = records.of_model("adapter_config.json" if records.facts.is_adapter else "config.json")
    return Found(tuple(one(f"{label}: {value}", file) for label, value in rows))


def _senses(records: RunRecords, outputs: bool) -> Found:
    facts = records.facts
    if not facts.config:
        return Found()
    file, config = records.of_model("config.json"), facts.language_config
    prefix = "text_config." if "max_position_embeddings" in (facts.config.get("text_config") or {}) else ""
    length = config.get("max_position_embeddings")
    findings, check = [], None
    if isinstance(length, int):
        share = "prompt and answer together at most" if outputs else "at most"
        what = "text" if not facts.is_classifier or not outputs else "scores of classes for a text of"
        findings.append(one(f"{what}, {share} {length:,} tokens", file, f"{prefix}max_position_embeddings"))
        check = check_number(length, f"{file}: {prefix}max_position_embeddings")
    else:
        findings.append(one("text; no largest size is defined", file))
    if not outputs:
        findings += [one(sense, file, key) for key, sense in _SENSES.items() if facts.config.get(key)]
    return Found(tuple(findings), contradicts=check)


def inputs(records: RunRecords) -> Found:
    """Return what the model reads, and how much at once."""
    return _senses(records, outputs=False)


def outputs(records: RunRecords) -> Found:
    """Return what the model writes, and how much at once."""
    return _senses(records, outputs=True)


def _weight_source(records: RunRecords) -> Source:
    folder = records.facts.path
    names = sorted(file.name for file in folder.glob("*.safetensors")) if folder else []
    return Source(records.of_model(names[0] if len(names) == 1 else "*.safetensors"))


def total_size(records: RunRecords) -> Found:
    """Return the parameters counted in the files of weights, and the form's range."""
    table, source, note = records.table, _weight_source(records), ""
    if table is None and len(records.stages) > 1 and records.stages[-1].kind == "quantize":
        before = records.stages[-2]
        folder = before.run.model_path
        table, source = try_to_count(folder), Source(records.of_stage(before, f"{folder.name}/*.safetensors"))
        note = ", counted before they were quantized"
    if table is None or not table.total:
        return Found()
    ranges = (*_RANGES, *_LARGE_RANGES)
    name = next((name for most, name in ranges if table.total <= most), "more than 1T")
    text = f"{table.total:,} parameters ({format_count(table.total)}); range {name}{note}"
    findings = [Finding(text, (source,))]
    if table.active and table.active != table.total:
        findings.append(
            Finding(f"{table.active:,} of them used per token", (source, Source(records.of_model("config.json"))))
        )
    lacks = "the base model's parameters" if records.facts.is_adapter else ""
    return Found(tuple(findings), lacks, check_number(table.total, f"{source}"))


def license_of_model(records: RunRecords) -> Found:
    """Return the license that the model's card states; its base model's alone leaves the question open."""
    folder = records.facts.path
    cards = {records.of_model("README.md"): folder / "README.md"} if folder else {}
    cards.setdefault("README.md", records.root / "README.md")
    for name, card in cards.items():
        fields = read_license(card)
        if fields:
            value = fields.get("license_name") or fields["license"]
            link = f" ({fields['license_link']})" if fields.get("license_link") else ""
            check = check_names([value], f"{name}: license")
            return Found((one(f"{value}{link}", name, "license"),), contradicts=check)
    base = records.lineage.base or records.facts.base
    known = find_license(None, folder=None, base=base) if base else None
    if known is None or not known.is_known:
        return Found()
    value = known.fields.get("license_name") or known.fields["license"]
    text = f"the base model {records.base} is under {value}"
    return Found((one(text, f"README.md of {records.base}", "license"),), "the license of this model")


def integration(records: RunRecords) -> Found:
    """Return which library loads the model, and whether code of its own comes along."""
    facts = records.facts
    if facts.is_adapter:
        return Found((one("loaded by the library peft", records.of_model("adapter_config.json")),))
    if not facts.config:
        return Found()
    name = records.of_model("config.json")
    findings = [one(f"loaded by the library transformers as {facts.model_type}", name, "model_type")]
    if facts.has_own_code:
        code = ", ".join(str(value) for value in facts.config["auto_map"].values())
        findings.append(one(f"the code that it needs lies beside it (trust_remote_code): {code}", name, "auto_map"))
    return Found(tuple(findings))


def hardware_needs(records: RunRecords) -> Found:
    """Return what the weights take in memory."""
    folder = records.facts.path
    files = sorted(folder.glob("*.safetensors")) if folder else []
    if not files:
        return Found()
    size = sum(file.stat().st_size for file in files)
    text = f"memory for weights of {size:,} bytes ({format_bytes(size)})"
    return Found((Finding(text, (_weight_source(records),)),))


def inference_compute(records: RunRecords) -> Found:
    """Return the operations of writing a stated number of tokens, from the parameters that each uses."""
    table = records.table
    if table is None or not table.active:
        return Found()
    flops = 2 * table.active * TASK_TOKENS
    text = f"{flops:.3g} FLOPs for {TASK_TOKENS:,} tokens, 2 x {table.active:,} parameters used per token"
    sources = (_weight_source(records), Source(records.of_model("config.json")))
    return Found((Finding(text, sources),), contradicts=check_number(flops, str(sources[0])))


def inference_method(records: RunRecords) -> Found:
    """Return how `inference_compute` counts."""
    if not inference_compute(records).findings:
        return Found()
    return Found(
        states=f"Counted, not measured: writing {TASK_TOKENS:,} tokens, 2 operations per token and parameter used; "
        "attention to earlier tokens is left out, and the count holds for any hardware."
    )
