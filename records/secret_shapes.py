"""What secrets and local paths look like. Called by ``leaks.py``.

Shapes of tokens come from here and from the detectors of `detect-secrets`, a well-kept library, where it is installed.
Of its detectors those for shapes are used. The two that guess, by entropy and by keywords, call every hash and every
`pad_token` a secret.
"""

import functools
import importlib
import math
import re
from collections.abc import Iterator, Mapping

# By kind, so that a finding can be named. Each is long enough not to occur by chance, in weights either.
TOKENS = {
    "Hugging Face": r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}",
    "OpenAI or Anthropic": r"\bsk-[A-Za-z0-9_-]{20,}",
    "GitHub": r"\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_[A-Za-z0-9_]{20,}",
    "GitLab": r"\bgl(?:pat|dt|ft|soat|rt|ptt|oas|agent|imt|cbt)-[A-Za-z0-9_-]{20,}|\bGR1348941[A-Za-z0-9_-]{20,}",
    "AWS": r"\b(?:AKIA|ASIA|ABIA|ACCA|A3T[A-Z0-9])[0-9A-Z]{16}\b",
    "Google": (
        r"\bAIza[0-9A-Za-z_-]{35}|\bya29\.[0-9A-Za-z_-]{20,}|\bGOCSPX-[0-9A-Za-z_-]{20,}|\b1//0[0-9A-Za-z_-]{30,}"
    ),
    "Stripe": r"\b(?:sk|rk|pk)_(?:live|test)_[0-9A-Za-z]{16,}|\bwhsec_[0-9A-Za-z]{24,}",
    "npm": r"\bnpm_[A-Za-z0-9]{30,}|_authToken=[^\s\"']{16,}",
    "PyPI": r"\bpypi-AgE[A-Za-z0-9_-]{30,}",
    "Slack": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}|\bxapp-[0-9A-Za-z-]{20,}|hooks\.slack\.com/services/[A-Za-z0-9/]{20,}",
    "SendGrid": r"\bSG\.[\w-]{20,}\.[\w-]{40,}",
    "JSON web token": r"\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "private key": r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----",
    "cloud storage": r"\bAccountKey=[A-Za-z0-9+/=]{40,}|\bsig=[A-Za-z0-9%+/=]{40,}",
}
# Shapes that are secrets by what stands around them: looked for in texts only.
NAMED = {
    # Not `ssh://git@host`: a user without a password, which every address of that kind has.
    "user and password in an address": (
        r"\b[A-Za-z][A-Za-z0-9+.-]*://(?:[^\s/@:'\"<>()]*:[^\s/@'\"<>()]+|(?!git@)(?<!ssh://)(?<!sftp://)"
        r"[^\s/@:'\"<>(){}]{8,})@"
    ),
    "bearer or basic authorization": r"(?i:\b(?:bearer|basic)\s+)(?=[^\s\"']*\d)[A-Za-z0-9._~+/-]{16,}=*",
    "a secret given to an option": (
        r"(?i:(?<![\w-])--?(?:[a-z]+[-_])*(?:token|password|passwd|api[-_]?key|access[-_]?key|secret)(?:=|\s+))"
        r"(?![-$<\[{])[^\s\"'`<>|]{8,}"
    ),
    "a secret given to a variable": (
        r"\b(?:[A-Z0-9]+_)*(?:[A-Z]*TOKEN|[A-Z]*SECRET|[A-Z]*PASSWORD|PASSWD|PASS|PAT|[A-Z]*KEY|DATABASE_URL)"
        r"\s?=\s?[\"']?(?![$<\[{.])(?=[^\s\"']*[0-9a-z])[^\s\"'`<>|\\,;)]{8,}"
    ),
    "a password in a connection string": r"(?i:\b(?:password|pwd)=)(?![$<\[{*])[^\s;\"'&]{4,}(?=;)",
}
TOKEN = re.compile("|".join(TOKENS.values()))
TOKEN_BYTES = re.compile(TOKEN.pattern.encode())
NAMED_SECRET = re.compile("|".join(NAMED.values()))

# Pictures and packed items in a page: letters, digits and slashes that mean nothing.
PACKED = re.compile(r"[A-Za-z0-9+/=]{200,}")

_PART = r"[\w.+@%~=-]+"
# Two parts or more; not inside an address, an "and/or" or a tag. After a colon, an equals sign or a quote it is one.
PATH = re.compile(
    r"(?i:\bfile:)/{1,3}(?:" + _PART + r"/)*" + _PART + "/?"
    r"|(?<![\w/.<~-])(?:~(?:[A-Za-z][\w.-]*)?)?(?:/" + _PART + r"){2,}/?"
    r"|(?<![\w/.<~-])~(?:[A-Za-z][\w.-]*)?/" + _PART +
    r"|(?<!\w)[A-Za-z]:(?:/(?!/)|\\{1,2}(?![nrt](?![a-z]+[\\.])))[\w.\\/+@~ -]*[\w/\\]"
    r"|(?<![\w\\])(?:\\{2}[\w.-]+\\|\\{4}[\w.-]+\\{2})(?=\w)[\w.\\$+@~ -]*[\w\\]"
    r"|(?<![\w/])(?:\.\.?/)*(?:\.\./)?(?:home|Users)/" + _PART + r"(?:/" + _PART + ")*/?"
)  # fmt: skip

# A name's words, so that TOKENIZER_NAME and MONKEY hold none.
_SECRET_WORDS = frozenset(
    (
        *(
            "TOKEN",
            "TOKENS",
            "SECRET",
            "SECRETS",
            "PASSWORD",
            "PASSWORDS",
            "PASSWD",
            "PASSPHRASE",
            "PASS",
            "PAT",
            "KEY",
        ),
        *("KEYS", "APIKEY", "CREDENTIAL", "CREDENTIALS", "CREDS", "DSN", "PWD", "COOKIE", "BEARER", "JWT", "WEBHOOK"),
    )
)
_SECRET_ENDS = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "APIKEY", "ACCESSKEY", "PASSPHRASE")
_CONNECTIONS = re.compile(r"(^|_)(DATABASE_UR[LI]|CONNECTION_?STR(ING)?|CONN_?STR(ING)?|SQLALCHEMY_URL)($|_)")
_NO_SECRETS = frozenset(("PWD", "OLDPWD"))
SECRET_SETTING = re.compile(
    r"(^|_)(token|secret|password|passwd|passphrase|credentials?|api_?key|access_?key|secret_?key|private_?key|dsn|"
    r"database_url)$",
    re.IGNORECASE,
)
_PASSWORD_OF_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s/@:]*:([^\s/@]+)@")


def is_secret_variable(name: str, value: str) -> bool:
    """Return whether a variable holds a secret, by its name's meaning or by the form of its value.

    Args:
        name: Of an environment variable.
        value: What it is set to.
    """
    upper = name.upper()
    if upper in _NO_SECRETS:
        return False
    words = upper.split("_")
    by_name = any(word in _SECRET_WORDS or word.endswith(_SECRET_ENDS) for word in words)
    return by_name or _CONNECTIONS.search(upper) is not None or _PASSWORD_OF_ADDRESS.search(value) is not None


def parts_to_hide(value: str) -> Iterator[str]:
    """Yield a secret value, and the password inside if it is an address.

    Args:
        value: Of a variable that holds a secret.
    """
    yield value
    for match in _PASSWORD_OF_ADDRESS.finditer(value):
        yield match[1]


# Names that say nothing about a person.
_COMMON_USERS = frozenset(
    [
        "root",
        "user",
        "users",
        "home",
        "admin",
        "ubuntu",
        "debian",
        "runner",
        "jovyan",
        "vscode",
        "nobody",
        "app",
        "work",
        "data",
        "test",
        "ec2-user",
    ]
)


@functools.lru_cache(maxsize=8)
def person_pattern(name: str) -> re.Pattern[str] | None:
    """Return what finds a person's name as one part of a path; None for names that are nobody's.

    Args:
        name: The last part of the home folder.
    """
    if len(name) < 3 or name.lower() in _COMMON_USERS:
        return None
    return re.compile(
        rf"(?:[\w.+@-]*[/\\])+{re.escape(name)}(?:[/\\][\w.+@-]*)*|(?<![\w/\\.-]){re.escape(name)}[/\\][\w.+@/\\-]+"
    )


# The shapes' own detectors; not those for what needs the network, guesses, or takes seconds on a large file.
_DETECTORS = {
    "artifactory": "Artifactory", "aws": "AWS", "azure_storage_key": "Azure", "discord": "Discord",
    "github_token": "GitHub", "gitlab_token": "GitLab", "jwt": "JSON web token", "mailchimp": "Mailchimp",
    "npm": "npm", "openai": "OpenAI", "private_key": "private key", "pypi_token": "PyPI", "sendgrid": "SendGrid",
    "slack": "Slack", "square_oauth": "Square", "stripe": "Stripe", "telegram_token": "Telegram", "twilio": "Twilio",
}  # fmt: skip


@functools.cache
def library_patterns() -> Mapping[str, tuple[re.Pattern[str], ...]]:
    """Return the expressions of `detect-secrets` by kind; none where it is not installed."""
    try:
        base = importlib.import_module("detect_secrets.plugins.base").RegexBasedDetector
    except ImportError:
        return {}
    found: dict[str, tuple[re.Pattern[str], ...]] = {}
    for file, kind in _DETECTORS.items():
        module = importlib.import_module(f"detect_secrets.plugins.{file}")
        classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, base)]
        found[kind] = tuple(pattern for item in classes if item is not base for pattern in item().denylist)
    return found


def has_entropy(text: str, least: float = 3.0) -> bool:
    """Return whether a text is as mixed as tokens are: `xxxxxxxx` and `your_token_here` are not.

    Args:
        text: What an expression of the library found.
        least: Bits for each character.
    """
    shares = [text.count(character) / len(text) for character in set(text)]
    return -sum(share * math.log2(share) for share in shares) >= least
