"""The graph as RDF: entities, statements with their evidence, and the plain triples that SPARQL asks for.

Every statement is a node with document, offsets, quote, rule and confidence; where nothing denies it, the triple
subject - relation - object stands beside it. What is not in the evidence is not in the graph.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek_training.knowledge.extract import Statement
from deepseek_training.knowledge.tables import Fact
from deepseek_training.knowledge.vocabulary import Vocabulary

if TYPE_CHECKING:
    from rdflib import Graph, URIRef

NAMESPACE = "urn:deepseek-moe:graph#"
SHAPES = Path(__file__).parent / "shapes.ttl"


def build_graph(statements: Iterable[Statement], vocabulary: Vocabulary, facts: Iterable[Fact] = ()) -> "Graph":
    """Return the graph of statements and facts; only terms that occur are in it.

    Args:
        statements: From `extract`.
        vocabulary: Their terms.
        facts: From `read_facts`.
    """
    from rdflib import RDF, Graph, Literal, Namespace
    from rdflib.namespace import XSD

    name = Namespace(NAMESPACE)
    graph = Graph()
    graph.bind("g", name)
    used: set[str] = set()
    for one in statements:
        used |= {one.subject, one.object}
        node = name[f"s-{_digest(one)}"]
        values = {
            "document": Literal(one.document),
            "begin": Literal(one.begin),
            "end": Literal(one.end),
            "quote": Literal(one.quote),
            "rule": Literal(one.rule),
            "confidence": Literal(str(one.confidence), datatype=XSD.decimal),
            "negated": Literal(one.is_negated),
            "subject": _entity(one.subject),
            "relation": name[one.relation],
            "object": _entity(one.object),
        }
        graph.add((node, RDF.type, name.Statement))
        for key, value in values.items():
            graph.add((node, name[key], value))
        if not one.is_negated:
            graph.add((_entity(one.subject), name[one.relation], _entity(one.object)))
    _add_entities(graph, used, vocabulary)
    _add_facts(graph, facts)
    return graph


def _add_entities(graph: "Graph", used: set[str], vocabulary: Vocabulary) -> None:
    from rdflib import RDF, RDFS, Literal, Namespace

    name = Namespace(NAMESPACE)
    for key in sorted(used):
        term = vocabulary.terms[key]
        graph.add((_entity(key), RDF.type, name.Entity))
        graph.add((_entity(key), RDFS.label, Literal(term.name)))
        graph.add((_entity(key), name.kind, Literal(term.kind)))
        for parent in term.parents:
            if parent in used:
                graph.add((_entity(key), name.broader, _entity(parent)))


def _add_facts(graph: "Graph", facts: Iterable[Fact]) -> None:
    from rdflib import RDF, Literal, Namespace
    from rdflib.namespace import XSD

    name = Namespace(NAMESPACE)
    for fact in facts:
        node = name[f"f-{_digest(fact)}"]
        graph.add((node, RDF.type, name.Fact))
        for key, value in (("table", fact.table), ("item", fact.item), ("period", fact.period), ("cell", fact.cell)):
            graph.add((node, name[key], Literal(value)))
        graph.add((node, name.value, Literal(repr(fact.value), datatype=XSD.double)))


def _entity(key: str) -> "URIRef":
    from rdflib import URIRef

    return URIRef(NAMESPACE + key.replace(":", "-", 1).replace(" ", "-"))


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def write_turtle(graph: "Graph", path: Path) -> None:
    """Write a graph as Turtle, equal graphs to equal bytes.

    Args:
        graph: The graph.
        path: The file.
    """
    graph.serialize(str(path), format="longturtle")


def read_turtle(path: Path) -> "Graph":
    """Return the graph of a Turtle file.

    Args:
        path: The file.

    Raises:
        ValueError: It is not Turtle.
    """
    from rdflib import Graph

    graph = Graph()
    try:
        graph.parse(str(path), format="turtle")
    except Exception as error:  # the parser's own class is not public
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(f"graph: {path}: got no Turtle ({reason}), expected some") from None
    return graph


def check_shapes(graph: "Graph") -> list[str]:
    """Return what in a graph breaks the shapes of ``shapes.ttl``, one line each; none where it conforms.

    Args:
        graph: The graph.
    """
    import pyshacl
    from rdflib import SH

    conforms, report, _ = pyshacl.validate(graph, shacl_graph=str(SHAPES), advanced=False)
    if conforms:
        return []
    lines = []
    for result in report.subjects(SH.resultSeverity):
        node, path = report.value(result, SH.focusNode), report.value(result, SH.resultPath)
        message = report.value(result, SH.resultMessage)
        lines.append(f"{_short(node)} {_short(path)}: {message}".replace("\n", " "))
    return sorted(lines)


def run_query(graph: "Graph", query: str) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of a SPARQL query; ``g:`` is the graph's namespace, ``rdfs:`` has the labels.

    Args:
        graph: The graph.
        query: SELECT or ASK.

    Raises:
        ValueError: It is no such query.
    """
    try:
        result = graph.query(query, initNs={"g": NAMESPACE, "rdfs": "http://www.w3.org/2000/01/rdf-schema#"})
        if result.type == "ASK":
            return ["answer"], [[str(result.askAnswer).lower()]]
        if result.type != "SELECT":
            raise ValueError(f"query: got {result.type}, expected SELECT or ASK")
        bindings = [[row.get(name) for name in result.vars or ()] for row in result.bindings]
        rows = [["" if value is None else _short(value) for value in row] for row in bindings]
    except ValueError:
        raise
    except Exception as error:  # the parser's own class is not public
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(f"query: got no SPARQL ({reason}), expected SELECT or ASK") from None
    return [str(name) for name in result.vars or ()], rows


def _short(value: Any) -> str:
    return str(value).removeprefix(NAMESPACE)
