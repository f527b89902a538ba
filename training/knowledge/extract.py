"""Statements of text: the topic of a passage, a relation by its section, and a term that it names.

Rules, no model: a term is found by its names, negation and doubt by cue words before it in the same clause (after
NegEx, Chapman et al. 2001, J Biomed Inform 34:301), and the relation by the question that the passage answers.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator

from deepseek_training.knowledge.passages import Passage
from deepseek_training.knowledge.relations import ListLeads, relation_of
from deepseek_training.knowledge.vocabulary import Mention, Term, Vocabulary, normalize

_SENTENCE = re.compile(r"[^.!?\n]+[.!?]?|\n")
_CLAUSE_END = re.compile(
    r"[;:]|,?\s+\b(?:but|however|although|though|except|while|whereas|because|since|until|so that|and so|therefore)\b",
    re.I,
)
# A clause that begins so ends at its comma.
_SUBORDINATE = re.compile(r"^\s*(?:although|though|while|because|if|when|unless|since|without|in those)\b[^,]*,", re.I)
_NEGATION = re.compile(
    r"\b(?P<noun>no(?! one\b)|without|absent|absence of|lack of|lacks?)\b"
    r"|\b(?:not|never|neither|nor|no one|none|nobody|nothing|free (?:of|from)|denies|denied"
    r"|unlikely|rather than|rule[sd]? out|excludes?|excluded|negative for|fail(?:s|ed)? to|instead of|cannot|can't"
    r"|don't|doesn't|isn't|aren't|didn't|won't|unrelated to)\b",
    re.I,
)
# What follows a cue that then denies nothing: "not only", "no doubt", "not uncommon", "does not help against".
_PSEUDO = re.compile(
    r"^\s+(?:only|just|all|every|always|uncommon|unusual|rare|doubt|longer|later|more|less|effect|idea|matter"
    r"|(?:fully |well )?(?:known|understood|clear)|know|help|treat|cure|prevent|stop|slow|improve|control|go"
    r"|heal)s?\b",
    re.I,
)
# The negation of a noun ends at a verb: "no treatment stops", "lack of iron results in".
_VERB = re.compile(
    r"\b(?:stops?|leads?|led|results?|resulted|causes?|caused|means?|sets?|makes?|made|follows?|helps?|exists?"
    r"|appears?|brings?|produces?)\b",
    re.I,
)
_BEHIND = re.compile(
    r"^(?:\s*(?:,|and|or)\s+\w+)?\s*(?:is|are|was|were|does|do|did)\s+"
    r"(?:absent|unlikely|ruled out|excluded|(?:not|never)\b(?P<rest>.*))",
    re.I | re.S,
)
# What is denied behind a term is something else of it: "does not go away", "is not known".
_OF_ANOTHER = re.compile(
    r"^\s+(?!(?:occur|appear|develop|present|seen|found|reported|noted|observed|part|common|in|at|among)\b)\w+", re.I
)
_DOUBT = re.compile(r"\b(?:may|might|can|could|sometimes|rarely|possibly|possible|suspected|some people)\b", re.I)
_NEGATION_REACH = 60  # characters between cue and term: about eight words


@dataclasses.dataclass(frozen=True)
class Statement:
    """That a document relates two entities.

    Args:
        subject: Id of the topic.
        relation: From `relation_of`.
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
        leads = ListLeads()
        for sentence in _SENTENCE.finditer(passage.text):
            lead = leads.of(sentence[0])
            mentions = [
                one
                for one in vocabulary.find(sentence[0])
                if one.term != subject and not _is_same(passage.topic, sentence[0][one.begin : one.end])
            ]
            for mention in mentions:
                others = [(one.begin, one.end) for one in mentions if one.term != mention.term]
                places = [
                    (begin + len(lead), end + len(lead)) for begin, end in [(mention.begin, mention.end), *others]
                ]
                relation = relation_of(passage.section, lead + sentence[0], places[0], places[1:])
                yield _state(passage, sentence, mention, subject, relation)


def _is_same(topic: str, quote: str) -> bool:
    """Whether a name is that of the topic or a part of it: "cancer" in text on breast cancer relates to nothing."""
    first, second = set(normalize(topic)), set(normalize(quote))
    return first <= second or second <= first


def _state(passage: Passage, sentence: re.Match[str], mention: Mention, subject: str, relation: str) -> Statement:
    text, begin = sentence[0], passage.begin + sentence.start()
    is_negated, is_doubted = judge(text, mention.begin, mention.end)
    return Statement(
        subject=subject,
        relation=relation,
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
    before = _SUBORDINATE.sub("", sentence[:begin])
    clause = _CLAUSE_END.split(before)[-1]
    return _is_denied(clause, sentence[end:]), _DOUBT.search(clause) is not None


def _is_denied(before: str, after: str) -> bool:
    """Whether a cue in the clause before a term, or what is said of it behind, denies it."""
    for cue in _NEGATION.finditer(before):
        between = before[cue.end() :]
        if len(between) > _NEGATION_REACH or _PSEUDO.match(between):
            continue
        if not (cue["noun"] and _VERB.search(between)):
            return True
    behind = _BEHIND.match(after)
    return behind is not None and _OF_ANOTHER.match(behind["rest"] or "") is None
