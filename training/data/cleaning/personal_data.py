"""Masks personal data by pattern and check digits, each with a placeholder that names its kind.

What has check digits is masked only where they hold: in running text and in code most long numbers are none. What has
none (phone numbers, medical record numbers) needs its form or the word before it. Names are masked behind a title or a
label only, and only on demand; other names stay. Check digits are those of python-stdnum.
"""

import functools
import importlib
import re
from collections.abc import Callable

_SEP = r"[ .\-\u2011\u2013]"
_LABEL = r"(?:\s*(?:no\.?|number|nr\.?|id|#))?\s*[:#=]?\s*"
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+%-]{1,64}@(?:[\w-]{1,63}\.)+[A-Za-z\u00a1-\uffff]{2,24}\b(?!\.\w)")
_IPV4 = re.compile(r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w]|\.\d)")
_NO_ADDRESS = re.compile(r"(?i)(?:version|v|section|chapter|release)\.? ?$")
_CARD = re.compile(rf"(?<![\w.,-])\d(?:{_SEP}?\d){{12,18}}(?![\w]|[.,-]\d)")
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?!\w)")
# International with +, North American with its grouping, others only behind a word that says so.
_PHONE = re.compile(
    rf"(?<![\w+])\+\d{{1,3}}(?:{_SEP}?\(?\d{{1,4}}\)?){{2,6}}\d(?!\w)"
    rf"|(?<![\w.-])(?:1{_SEP})?(?:\(\d{{3}}\) ?|\d{{3}}[.\-\u2011])\d{{3}}[.\-\u2011]\d{{4}}(?![\w]|[.-]\d)"
    rf"|(?<=\b)(?i:tel|phone|telephone|mobile|cell|fax|call|telefon|handy|tel\u00e9fono|t\u00e9l)\.?{_LABEL}"
    rf"(\(?\d(?:{_SEP}?[()]?\d){{5,13}})(?!\w)"
    r"|(?:\u7535\u8bdd|\u624b\u673a)[\u53f7\u7801]*[\uff1a:]?\s*(1\d{10}|0\d{2,3}-?\d{7,8})(?!\d)"
)
_RECORD = re.compile(
    r"\b(?:MRN|(?i:medical record|patient id|patient no|hospital no|chart no|case record))(?i:" + _LABEL + r")"
    r"([A-Z]{0,3}-?\d(?:-?\d){4,11})(?!\w)"
)
_TITLE = r"(?:Mr|Mrs|Ms|Miss|Dr|Prof|Herr|Frau|Mme|Sr|Sra)\.?"
_NAME_WORD = r"[A-Z\u00c0-\u00de][\w'\u2019-]+"
_NAME = re.compile(
    rf"(?<=\b)(?:{_TITLE}|(?i:patient(?:'s)? name|patient|name|contact)\s*:)\s+"
    rf"({_NAME_WORD}(?: (?:[A-Z]\.|{_NAME_WORD})){{0,2}})"
)
_TAX_ID = r"(?i:\b(?:steuer-?id\w*|idnr|steueridentifikationsnummer)"
# Country, pattern and module of python-stdnum that tells whether the number is one. Numbers with few check digits also
# need a word before them, or every eleventh number of nine digits would be one.
_NATIONAL = (
    ("US", r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])", "us.ssn"),
    ("CN", r"(?<!\w)\d{17}[\dXx](?!\w)", "cn.ric"),
    ("ES", r"(?<!\w)(?:\d{8}|[XYZ]\d{7})-?[A-Z](?!\w)", "es.dni|es.nie"),
    ("IT", r"(?<!\w)[A-Z]{6}\d{2}[A-EHLMPRST]\d{2}[A-Z]\d{3}[A-Z](?!\w)", "it.codicefiscale"),
    ("FR", r"(?<!\w)[12] ?\d{2} ?\d{2} ?\d{2} ?\d{3} ?\d{3} ?\d{2}(?!\w)", "fr.nir"),
    ("BR", r"(?<!\w)\d{3}\.\d{3}\.\d{3}-\d{2}(?!\w)", "br.cpf"),
    ("GB", r"(?i:\bNHS" + _LABEL + r")(\d{3}[ -]?\d{3}[ -]?\d{4})(?!\w)", "gb.nhs"),
    ("DE", _TAX_ID + _LABEL + r")(\d{2} ?\d{3} ?\d{3} ?\d{3})(?!\w)", "de.idnr"),
    ("NL", r"(?i:\bBSN" + _LABEL + r")(\d{9})(?!\w)", "nl.bsn"),
)  # fmt: skip
PLACEHOLDERS = {
    **{"email": "[EMAIL]", "ip_address": "[IP]", "iban": "[IBAN]", "national_id": "[ID]", "card": "[CARD]"},
    **{"medical_record": "[MRN]", "phone": "[PHONE]", "name": "[NAME]"},
}


def mask(text: str, *, names: bool = False) -> tuple[str, dict[str, int]]:
    """Return the text with personal data masked, and how many of each kind there were.

    Args:
        text: The text.
        names: Mask names behind a title or a label, too.
    """
    counts: dict[str, int] = {}

    def apply(
        kind: str, pattern: re.Pattern[str], is_one: Callable[[str, str], bool] = lambda found, before: True
    ) -> None:
        nonlocal text
        text = pattern.sub(lambda match: _replace(match, kind, is_one, counts), text)

    if "@" in text:
        apply("email", _EMAIL)
    if any(character.isdigit() for character in text):
        apply("iban", _IBAN, lambda found, _: _is_valid("iban", found))
        for pattern, modules in _NATIONAL_COMPILED:
            apply("national_id", pattern, functools.partial(_is_national, modules))
        apply("card", _CARD, lambda found, _: _is_card(found))
        apply("medical_record", _RECORD)
        apply("phone", _PHONE, lambda found, _: 6 <= sum(map(str.isdigit, found)) <= 15)
        apply("ip_address", _IPV4, lambda _, before: not _NO_ADDRESS.search(before))
    if names:
        apply("name", _NAME)
    return text, counts


def _replace(match: re.Match[str], kind: str, is_one: Callable[[str, str], bool], counts: dict[str, int]) -> str:
    """The placeholder in place of the last group that took part, else of all of it."""
    start, end = match.span(match.lastindex or 0)
    if not is_one(match.string[start:end], match.string[max(0, start - 12) : start]):
        return match[0]
    counts[kind] = counts.get(kind, 0) + 1
    return match[0][: start - match.start()] + PLACEHOLDERS[kind] + match[0][end - match.start() :]


def _is_national(modules: str, found: str, before: str) -> bool:
    return _is_valid(modules, found)


def _is_valid(modules: str, found: str) -> bool:
    return any(importlib.import_module(f"stdnum.{name}").is_valid(found) for name in modules.split("|"))


def _is_card(found: str) -> bool:
    """Luhn's check digit, a first digit that issuers use, and a length that cards have."""
    from stdnum import luhn

    digits = re.sub(r"\D", "", found)
    lengths = {"3": (14, 15, 16), "4": (13, 16, 19), "5": (16,), "2": (16,), "6": (16, 19)}
    return len(digits) in lengths.get(digits[0], ()) and len(set(digits)) > 2 and luhn.is_valid(digits)


_NATIONAL_COMPILED = tuple((re.compile(pattern), modules) for _, pattern, modules in _NATIONAL)
