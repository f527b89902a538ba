"""Statements of text: the topic of a passage, a relation by its section, and a term that it names.

Rules, no model: a term is found by its names, negation and doubt by cue words before it in the same clause (after
NegEx, Chapman et al. 2001, J Biomed Inform 34:301), and the relation by the question that the passage answers.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator

from deepseek_training.knowledge.passages import Passage
from deepseek_training.knowledge.vocabulary import Mention, Term, Vocabulary, normalize

RELATIONS = {
    "symptoms": "has_sign",
    "definition": "has_sign",
    "complications": "has_complication",
    "causes": "has_cause",
    "risk": "has_risk",
    "treatments": "treatment_names",
    "diagnosis": "diagnosis_names",
    "outlook": "outlook_names",
}
_OTHER = "names"
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]?|\n")
_CLAUSE_END = re.compile(r"[;:]|,?\s+\b(?:but|however|although|though|except|while|whereas)\b", re.I)
_NEGATION = re.compile(
    r"\b(?:no|not|never|neither|nor|without|absent|absence of|lack of|lacks?|free of|denies|denied|unlikely"
    r"|rather than|rule[sd]? out|ruled out|instead of|cannot|can't|don't|doesn't"
    r"|isn't|aren't|didn't|won't|unrelated to)\b",
    re.I,
)
_BEHIND = re.compile(r"^\s*(?:is|are|was|were)\s+(?:not|never|absent|unlikely|ruled out)\b", re.I)
_DOUBT = re.compile(r"\b(?:may|might|can|could|sometimes|rarely|possibly|possible|suspected|some people)\b", re.I)
_NEGATION_REACH = 60  # characters between cue and term: about eight words


@dataclasses.dataclass(frozen=True)
class Statement:
    """That a document relates two entities.

    Args:
        subject: Id of the topic.
        relation: One of `RELATIONS`, or ``names``.
        object: Id of the term.
        document: Where it is said.
        begin: First character of the term's name in the document.
        end: One past the last.
        quote: The name as it stands there.
        rule: What found it.
        confidence: 0.9 where it is said plainly, 0.6 with a word of doubt.
        is_negated: Whether it is denied.
    """

    subject: str
    relation: str
    object: str
    document: str
    begin: int
    end: int
    quote: str
    rule: str
    confidence: float
    is_negated: bool = False


def topic_id(topic: str) -> str:
    """Return the id of a topic: equal for names that differ in case, plural and punctuation only.

    Args:
        topic: As the text has it.
    """
    return "topic:" + "-".join(normalize(topic))


def topic_terms(passages: Iterable[Passage]) -> list[Term]:
    """Return the topics of passages as terms, with their names and abbreviations such as ``Name (ABC)``.

    Args:
        passages: All of the data.
    """
    names: dict[str, dict[str, None]] = {}
    for passage in passages:
        key = topic_id(passage.topic)
        if passage.topic and key != "topic:":
            whole = names.setdefault(key, {})
            whole[passage.topic] = None
            bare, _, short = passage.topic.partition("(")
            if short:
                whole[bare.strip()] = None
    return [Term(key, next(iter(found)), "topic", tuple(found)) for key, found in names.items()]


def extract(passages: Iterable[Passage], vocabulary: Vocabulary) -> Iterator[Statement]:
    """Yield what passages with a topic state.

    Args:
        passages: The passages.
        vocabulary: Terms to look for, the topics among them.
    """
    for passage in passages:
        subject = topic_id(passage.topic)
        if not passage.topic or subject == "topic:":
            continue
        for sentence in _SENTENCE.finditer(passage.text):
            for mention in vocabulary.find(sentence[0]):
                if mention.term != subject:
                    yield _state(passage, sentence, mention, subject)


def _state(passage: Passage, sentence: re.Match[str], mention: Mention, subject: str) -> Statement:
    text, begin = sentence[0], passage.begin + sentence.start()
    is_negated, is_doubted = judge(text, mention.begin, mention.end)
    return Statement(
        subject=subject,
        relation=RELATIONS.get(passage.section, _OTHER),
        object=mention.term,
        document=passage.document,
        begin=begin + mention.begin,
        end=begin + mention.end,
        quote=text[mention.begin : mention.end],
        rule=f"section {passage.section or 'none'}",
        confidence=0.6 if is_doubted else 0.9,
        is_negated=is_negated,
    )


def judge(sentence: str, begin: int, end: int) -> tuple[bool, bool]:
    """Return whether a term is denied, and whether it is said with doubt.

    Args:
        sentence: The sentence.
        begin: Where the term begins in it.
        end: Where it ends.
    """
    before = sentence[:begin]
    for clause_end in _CLAUSE_END.finditer(sentence[:begin]):
        before = sentence[clause_end.end() : begin]
    cues = [match for match in _NEGATION.finditer(before) if len(before) - match.end() <= _NEGATION_REACH]
    # "not only" and "no longer than" deny nothing of what follows.
    cues = [match for match in cues if not re.match(r"\s+only\b", before[match.end() :], re.I)]
    is_negated = bool(cues) or _BEHIND.match(sentence[end:]) is not None
    return is_negated, _DOUBT.search(before) is not None
