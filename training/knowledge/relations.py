"""Which relation a sentence states between the topic of its passage and a term that it names.

The question that a passage answers says which one may be stated; the words around the term take it back where they
speak of something else: what another thing causes, the signs of another disease, a cause where signs are asked for.
"""

import re
from collections.abc import Sequence

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
OTHER = "names"
_STATED = ("has_sign", "has_complication", "has_cause", "has_risk")
_DEFINITION = "definition"
# A definition names much beside signs: only a sentence that says so states one.
_SIGN_CUE = re.compile(
    r"\b(?:symptoms?|signs?|characteri[sz]ed by|marked by|indicated by|causes?|causing|leads? to|results? in"
    r"|(?:may|can|often|also|usually) (?:have|feel|experience|develop|include|suffer|be|cause)|accompanied"
    r"|complain)\b",
    re.I,
)
_OFTEN = r"(?:(?:can|may|might|could|will|often|also|usually|sometimes|that|which|in turn)\s+)*"
_CAUSES = r"(?:causes?|leads? to|results? in|produces?|makes?|triggers?)"
# A verb with an effect behind it; the noun ("causes include", "causes of") has none.
_EFFECT = re.compile(
    r"\b(?:(?:can|may|might|could|will|to|that|which|also|often|sometimes)\s+cause|causes(?!\s+(?:of|for|include|are|is|may"
    r"|can|vary)\b|\s*:)|causing|leads? to|leading to|results? in|resulting in|produces?|creates?|triggers?)\b[^:;]*$",
    re.I,
)
_PEOPLE = r"(?:people|persons?|individuals|patients|adults|children|babies|infants|women|men|those|someone|born)"
# Whichever the relation: "allergy medications"; "celiac disease, an autoimmune disease in which".
_MODIFIER = re.compile(
    r"^\s+(?:\(\w+\)\s+|\d+\s+)?(?:medications?|medicines?|drugs?|pills?|tests?|testing|treatments?|therapy|vaccines?"
    r"|special\w+|doctors?"
    r"|research|genes?|risk|surger(?:y|ies)|patients?|symptoms?|virus(?:es)?|syndromes?|diseases?|disorders?|hormones?)\b",
    re.I,
)
_GLOSS = (re.compile(r",\s+an?\s+(?:\w+\s+)?$", re.I), re.compile(r"^\s+(?:in which|that|where|of)\b", re.I))
# "Medication to control high blood pressure"; "found in the topic Problems with Smell"; "pain from a heart attack".
_ASIDE = re.compile(
    r"\b(?:(?:treatments? (?:for|of)|to (?:treat|control|relieve|prevent|lower|reduce|manage))\s+(?:\w+\s+){0,3}"
    r"|(?:go to|visit|found in|information (?:on|about))\b[^.;]*|\bpain from an?\s+)$",
    re.I,
)
# "This tumor" is the topic itself.
_ITSELF = (
    re.compile(r"\b(?:this|these|the|that)\s+(?:\w+\s+)?$", re.I),
    re.compile(r"(?:tumou?r|cancer|infection)s?$", re.I),
)
_SIGNS_OF = (
    r"\b(?:signs?|symptoms?)\s+of\s+"
    r"(?:(?!\b(?:include|includes|are|is|may|can|such|like|vary|occur|appear|begin|start)\b)[^.;:])*$"
)
_UNKNOWN = (
    r"\b(?:know|knows|known|understand|understood|sure|clear|unclear)\s+(?:\w+\s+)?(?:why|how|what|whether|if)\b"
    r"[^,;]*$"
)
_BY_CAUSE = r"\b(?:caused by|due to|results? from|resulting from|because of|brought on by|triggered by)\b[^;]*$"
_UNLIKE = r"\b(?:different from|unlike|not the same as|similar to|while|whereas|mistaken for|confused with)\b[^.;]*$"
_POPULATION = (
    rf"\b{_PEOPLE}\s+(?:with|who\s+(?:have|has|get|develop))\s+(?:(?!\b(?:may|can|often|have|has|also|usually|develop|experience|feel|get|who|are|is)\b)"
    r"[\w(),'-]+\s+){0,6}$"
)
# By relation, what before the term in its sentence takes it back.
_AGAINST = {
    "has_sign": (
        *(_SIGNS_OF, _BY_CAUSE, _UNLIKE, _POPULATION),
        r"\bdepend(?:s|ing)? on\b",
        r"\bcauses?\s+(?:of|might|may|is|are|include)\b",
        r"\b(?:things?|factors?|conditions?|diseases?|problems?|medicines?|infections?|people)\s+(?:that|which)\s+"
        r"(?:(?:can|may|might|also)\s+)*(?:increase|cause|lead|raise|trigger|make|mimic|resemble)",
        r"\b(?:types?|kinds?|forms?|disorders|diseases|factors)\b[^,;]*\b(?:are|include|is)\b[^;]*$",
        r"\b(?:risk (?:of|for|factors?)|(?:more|less) likely to (?:get|develop|have)|along with|history of|tests? for"
        r"|treat(?:ment|ed|ing|s)?|prevent)\b[^;:]*$",
    ),
    "has_complication": (_SIGNS_OF, _BY_CAUSE, _UNLIKE, _POPULATION, r"\b(?:prevent|history of|tests? for)\b[^;:]*$"),
    "has_cause": (
        *(_SIGNS_OF, _UNKNOWN, _UNLIKE, _POPULATION),
        r"\bcauses? of\s+(?:\w+\s+){0,3}$",
        r"\b(?:risk (?:of|for)|complications?)\b[^;:]*$",
    ),
    # What comes behind "risk for" is at risk, not the cause of one.
    "has_risk": (
        r"\brisks?(?: factors?)? (?:of|for)\b"
        r"(?:(?!\b(?:if|when|include|includes|because|who|than|with|from|are|is|by)\b)[^.;:])*$",
        *(_UNKNOWN, _UNLIKE),
        r"\b(?:signs?|symptoms?)\s+(?:of|include|are)\b[^;]*$",
        r"\b(?:leads? to|results? in|called|known as|prevent|complications?)\b[^;:]*$",
        r"\brisk\s+$",
    ),
}
_BEFORE = {name: tuple(re.compile(one, re.I) for one in patterns) for name, patterns in _AGAINST.items()}
# A definition says first what the topic is: "is one of a group of genetic disorders".
_KIND = re.compile(
    r"\b(?:is|are)\s+(?:an?|one of|the|any)\s+"
    r"(?:(?!\b(?:that|which|characteri[sz]ed|marked|causes?|causing|with|where|symptoms?|signs?)\b)[^,;:.])*$",
    re.I,
)
# What is said of the term itself: "Polymyositis causes muscle weakness", "Proteinuria is the most common symptom".
_ACTS = re.compile(rf"^\s+{_OFTEN}{_CAUSES}\b", re.I)
_IS_CAUSED = re.compile(rf"^\s+{_OFTEN}(?:(?:is|are|be)\s+(?:\w+\s+)?(?:caused by|due to)|results? from)\b", re.I)
_IS_SIGN = re.compile(r"^\s+(?:is|are)\s+(?:(?:an?|the)\s+)?(?:\w+\s+){0,3}(?:signs?|symptoms?)\b", re.I)
# Another term does, of which this one is what it does.
_OF_OTHER = re.compile(
    rf"^(?:\s+(?:in|of|on)(?:\s+\w+){{1,3}}?)?\s+{_OFTEN}"
    rf"(?:{_CAUSES}|includes?|involves?|raises?|increases?|puts?|(?:is|are) an?)\b",
    re.I,
)
# Another term is what the sentence speaks of: "symptoms of heart failure include", "people with scabies have".
_ON_OTHER = re.compile(
    rf"\b(?:(?:signs?|symptoms?)\s+of|{_PEOPLE}\s+(?:with|who\s+(?:have|has|develop|get)))\s+(?:an?\s+|the\s+)?"
    r"(?:\w+\s+){0,2}$",
    re.I,
)


# A line that is followed by a list, and its end: a colon, or words that lack what they announce.
_ANNOUNCES = r"(?<=\binclude)|(?<=\bincluding)|(?<=\bsuch as)|(?<=\bare)|(?<=\bmay have)|(?<=\bmay be)"
_LEAD = re.compile(rf"^(.*?)(?::|{_ANNOUNCES})\s*(-.*)?$", re.S | re.I)
_MARKS = ("-", "*", "\u2022")


class ListLeads:
    """Knows the words that lead in a list, "Risk factors include:", for the sentences that are its items."""

    def __init__(self) -> None:
        self.lead, self._is_marked, self._is_first = "", False, False

    def of(self, sentence: str) -> str:
        """Return what leads in a sentence of a passage, empty where it is not an item; called in their order.

        Args:
            sentence: The next one.
        """
        bare = sentence.strip()
        if not bare:
            return ""
        if self._is_first:
            self._is_marked = bare.startswith(_MARKS)
        # A list without marks ends with the first line that is a sentence.
        is_item = bare.startswith(_MARKS) if self._is_marked else not bare.endswith((".", "!", "?"))
        found = self.lead if is_item or self._is_first else ""
        match = _LEAD.match(bare)
        self._is_first = match is not None and match[2] is None
        if match is not None and not (found and bare.startswith(_MARKS)):
            self.lead, self._is_marked = f"{match[1].strip()} ", match[2] is not None
        else:
            self.lead, self._is_first = found, False
        return found


def relation_of(section: str, sentence: str, place: tuple[int, int], others: Sequence[tuple[int, int]]) -> str:
    """Return the relation that a sentence states, ``names`` where it states none.

    Args:
        section: Which question its passage answers.
        sentence: The sentence.
        place: Where the term begins and ends in it.
        others: The same of terms that are neither this one nor the topic.
    """
    relation = RELATIONS.get(section, OTHER)
    if relation not in _STATED:
        return relation
    before, quote, after = sentence[: place[0]], sentence[slice(*place)], sentence[place[1] :]
    if section == _DEFINITION and (not _SIGN_CUE.search(sentence) or _KIND.search(before)):
        return OTHER
    if _MODIFIER.match(after) or _ASIDE.search(before) or after.rstrip().endswith("?"):
        return OTHER
    is_short = before.endswith("(") and after.startswith(")") and quote.isupper()  # of the name before it
    is_named = is_short or _both(_GLOSS, before, after) or _both(_ITSELF, before, quote)
    is_reversed = {
        "has_sign": lambda: _ACTS.match(after),
        "has_cause": lambda: _EFFECT.search(before) or _IS_CAUSED.match(after) or _IS_SIGN.match(after),
    }.get(relation, lambda: None)()
    is_against = _speaks_of_other(sentence, place[0], others) or any(
        pattern.search(before) for pattern in _BEFORE[relation]
    )
    return OTHER if is_named or is_reversed or is_against else relation


def _both(patterns: tuple[re.Pattern[str], re.Pattern[str]], first: str, second: str) -> bool:
    return patterns[0].search(first) is not None and patterns[1].search(second) is not None


def _speaks_of_other(sentence: str, begin: int, others: Sequence[tuple[int, int]]) -> bool:
    """Whether another term before this one causes it, includes it, is it, or is what the sentence is about."""
    return any(
        end <= begin and (_OF_OTHER.match(sentence[end:begin]) or _ON_OTHER.search(sentence[:first]))
        for first, end in others
    )
