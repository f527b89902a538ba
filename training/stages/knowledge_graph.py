"""Before training: find the entities and relations of domain text and keep them as a graph.

``deepseek-moe data graph`` calls `knowledge_graph`. The run folder holds the graph as Turtle, a picture, how
often each entity is named, and the duplicates and contradictions that the graph shows; on demand a balanced copy of
the text.
"""

import csv
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deepseek_records.hashes import hash_rows
from deepseek_records.run_folder import RunFolder, write_json
from deepseek_records.summary import Check, Summary
from deepseek_training.data.texts import count_bytes, describe_data, has_column, read_rows
from deepseek_training.knowledge.balance import BANDS, balanced_weights, band_of, count_documents, draw_balanced
from deepseek_training.knowledge.extract import Statement, extract, topic_terms
from deepseek_training.knowledge.findings import find_contradictions, find_duplicates
from deepseek_training.knowledge.graph_store import build_graph, check_shapes, write_turtle
from deepseek_training.knowledge.passages import Passage, cut_rows
from deepseek_training.knowledge.picture import draw_graph
from deepseek_training.knowledge.tables import Fact, read_facts, tables_of, wrong_totals
from deepseek_training.knowledge.vocabulary import Vocabulary, read_phenotypes, read_terms

GRAPH_FILE = "graph.ttl"
_LISTED = 200  # duplicates and contradictions in findings.json


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphSettings:
    """What a graph is made of.

    Args:
        data: Texts, named as for `load_texts`.
        column: Their column.
        vocabularies: ``hpo``, or TSV files of terms; the texts' own topics come first.
        tables: JSON files of tables, in TAT-QA's form.
        balance: Strength with which a balanced copy of the training text is drawn; None for no copy.
        seed: Of the draws.
    """

    data: list[str]
    column: str | None = None
    vocabularies: list[str] = dataclasses.field(default_factory=list)
    tables: list[str] = dataclasses.field(default_factory=list)
    balance: float | None = None
    seed: int = 0


def knowledge_graph(settings: GraphSettings, output: str | Path, *, overwrite: bool = False) -> Summary:
    """Build the graph and return the summary.

    Args:
        settings: What it is made of.
        output: The run folder.
        overwrite: Delete the run that the folder holds.

    Raises:
        FileExistsError: The folder holds another run.
        FileNotFoundError: A source is missing.
        ValueError: A source cannot be used, or nothing is found.
    """
    started = time.monotonic()
    rows = {name: list(_rows(name, settings.column)) for name in settings.data}
    passages = [one for name, found in rows.items() for one in cut_rows(found, name)]
    vocabulary, versions = load_vocabulary(settings.vocabularies, passages)
    statements = list(extract(passages, vocabulary))
    tables = [table for path in settings.tables for table in tables_of(_read_json(Path(path)))]
    facts = [fact for key, cells in tables for fact in read_facts(key, cells)]
    if not statements and not facts:
        raise ValueError("data: got text that states nothing of a topic, expected lines such as 'What causes NAME ?'")
    plain = dataclasses.asdict(settings)
    run = RunFolder.create(output, plain, command="data graph", seed=settings.seed, overwrite=overwrite)
    run.hold_to(data=hash_rows(row["text"] for found in rows.values() for row in found))
    graph = build_graph(statements, vocabulary, facts)
    write_turtle(graph, run.path / GRAPH_FILE)
    violations = check_shapes(graph)
    if statements:
        draw_graph(statements, vocabulary, run.path / "graph.png")
    training = [row["text"] for found in rows.values() for row in found if row.get("split", "train") == "train"]
    details = {
        **_write_bands(run.path, training, vocabulary, settings),
        **_write_findings(run.path, passages, statements, tables, facts),
        "vocabularies": versions,
        "triples": len(graph),
        "statements": len(statements),
        "negated": sum(one.is_negated for one in statements),
        "relations": dict(Counter(one.relation for one in statements).most_common()),
        "facts": len(facts),
        "violations": violations[:_LISTED],
    }
    texts = {name: [row["text"] for row in found] for name, found in rows.items()}
    summary = Summary(
        stage="data graph",
        data=tuple(describe_data(name, "all", found, "training") for name, found in texts.items()),
        checks=(Check.compare("nodes that break a shape", float(len(violations)), "<=", 0.0),),
        seconds=round(time.monotonic() - started, 1),
        details=details,
    )
    return run.finish(summary)


def load_vocabulary(names: Sequence[str], passages: Sequence[Passage]) -> tuple[Vocabulary, dict[str, str]]:
    """Return the terms to look for, and the version of each vocabulary.

    Args:
        names: ``hpo`` or paths of TSV files.
        passages: Whose topics are terms, too.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: One cannot be read.
    """
    terms, versions = topic_terms(passages), {}
    for name in names:
        if name == "hpo":
            found, versions[name] = read_phenotypes()
        else:
            found, versions[Path(name).name] = read_terms(Path(name)), "file"
        terms += found
    return Vocabulary(terms), versions


def _rows(name: str, column: str | None) -> Iterator[dict[str, Any]]:
    """Rows with text; of questions and answers about a topic the answer is the text."""
    is_answer = column is None and has_column(name, "focus") and not has_column(name, "text")
    yield from read_rows(name, "all", column="answer" if is_answer else column)


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"tables: no file {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"tables: {path}: got no JSON ({error}), expected TAT-QA's form") from None


def _write_bands(
    folder: Path, training: Sequence[str], vocabulary: Vocabulary, settings: GraphSettings
) -> dict[str, Any]:
    """Write how often each entity is named in the training text, and the balanced copy."""
    counts, named = count_documents(training, vocabulary)
    with open(folder / "entities.tsv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["id", "name", "type", "documents", "band"])
        for term, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
            known = vocabulary.terms[term]
            writer.writerow([term, known.name, known.kind, count, band_of(count)])
    by_band = Counter(band_of(count) for count in counts.values())
    found: dict[str, Any] = {"entities": len(counts), "bands": {band: by_band.get(band, 0) for band in BANDS}}
    if settings.balance is not None:
        weights = balanced_weights(named, counts, settings.balance)
        drawn = draw_balanced(training, weights, count_bytes(training), seed=settings.seed)
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in drawn)
        (folder / "balanced.jsonl").write_text(lines, encoding="utf-8")
        found |= {"balanced_documents": len(drawn), "balanced_bytes": count_bytes(drawn)}
    return found


def _write_findings(
    folder: Path,
    passages: Sequence[Passage],
    statements: Sequence[Statement],
    tables: Sequence[tuple[str, list[list[str]]]],
    facts: Sequence[Fact],
) -> dict[str, Any]:
    """Write the duplicates, contradictions and wrong totals for a person to look at."""
    texts = {(one.document, one.begin): one.text for one in passages}
    duplicates = find_duplicates(passages)
    contradictions = find_contradictions(statements)
    by_table: dict[str, list[Fact]] = {}
    for fact in facts:
        by_table.setdefault(fact.table, []).append(fact)
    totals = [pair for key, cells in tables for pair in wrong_totals(by_table.get(key, []), cells)]

    def quoted(one: Statement) -> str:
        begin, text = next(
            (place, text)
            for (document, place), text in texts.items()
            if document == one.document and place <= one.begin < place + len(text)
        )
        return " ".join(text[max(0, one.begin - begin - 80) : one.end - begin + 40].split())

    write_json(
        folder / "findings.json",
        {
            "duplicates": [dataclasses.asdict(one) for one in duplicates[:_LISTED]],
            "contradictions": [
                {
                    "topic": one.stated.subject,
                    "relation": one.stated.relation,
                    "term": one.stated.object,
                    "stated": [one.stated.document, quoted(one.stated)],
                    "denied": [one.denied.document, quoted(one.denied)],
                }
                for one in contradictions[:_LISTED]
            ],
            "wrong_totals": [{**dataclasses.asdict(fact), "sum_of_rows": value} for fact, value in totals[:_LISTED]],
        },
    )
    return {"duplicates": len(duplicates), "contradictions": len(contradictions), "wrong_totals": len(totals)}
