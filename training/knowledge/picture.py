"""A picture of the graph's most connected part."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from deepseek_training.knowledge.extract import Statement
from deepseek_training.knowledge.vocabulary import Vocabulary

_COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")


def draw_graph(statements: Sequence[Statement], vocabulary: Vocabulary, path: Path, *, num_entities: int = 40) -> None:
    """Draw the entities with the most neighbors, and what is stated between them.

    Args:
        statements: Of the graph.
        vocabulary: Their terms.
        path: PNG to write.
        num_entities: At most this many.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import networkx

    edges = Counter((one.subject, one.object) for one in statements if not one.is_negated)
    neighbors: Counter[str] = Counter()
    for subject, other in edges:
        neighbors.update((subject, other))
    chosen = {term for term, _ in sorted(neighbors.items(), key=lambda pair: (-pair[1], pair[0]))[:num_entities]}
    graph = networkx.Graph()
    graph.add_nodes_from(sorted(chosen))
    graph.add_edges_from(sorted(edge for edge in edges if set(edge) <= chosen))
    places = networkx.spring_layout(graph, seed=0, k=1.2)
    kinds = sorted({vocabulary.terms[term].kind for term in chosen})
    colors = dict(zip(kinds, _COLORS * (1 + len(kinds) // len(_COLORS)), strict=False))
    figure, axes = plt.subplots(figsize=(11, 8), dpi=110)
    networkx.draw_networkx_edges(graph, places, ax=axes, edge_color="#bbbbbb", width=0.8)
    for kind in kinds:
        nodes = [term for term in graph if vocabulary.terms[term].kind == kind]
        sizes = [40 + 8 * neighbors[term] for term in nodes]
        networkx.draw_networkx_nodes(
            graph, places, nodelist=nodes, node_size=sizes, node_color=colors[kind], label=kind, ax=axes
        )
    labels = {term: vocabulary.terms[term].name[:28] for term in graph}
    networkx.draw_networkx_labels(graph, places, labels, font_size=7, ax=axes)
    axes.legend(loc="lower right", markerscale=0.5)
    axes.set_title(f"{len(chosen)} entities with the most neighbors")
    axes.axis("off")
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
