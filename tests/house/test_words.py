"""Plain, American English in code and pages: a few habits that a search can find.

None is allowed but in what is quoted. `Surprising:` may stand where a reader's first guess would be wrong, in about
one module in eight; its number may only shrink.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("kernels", "modeling_deepseek", "records", "model_cards", "training", "eval", "serving", "cli", "dev", "docs")
MOST_SURPRISES = 22

_STEMS = (
    "normalis|summaris|organis|initialis|optimis|recognis|generalis|specialis|tokenis|quantis|penalis|minimis|maximis|"
    "characteris|memoris|parallelis(?!m)|serialis|customis|utilis|visualis|synchronis|standardis|randomis|categoris|"
    "emphasis(?=e|ing)|prioritis|localis|factoris|vectoris|regularis|binaris|discretis|equalis|finalis|materialis|"
    "realis(?=e|ing|ation)|licenc|colour|behaviour|favour|neighbour|honour|centr(?=e\\b|ed\\b)|modell|labell|cancell|"
    "travell|judgement|programme\\b|defence|artefact|whilst|amongst|learnt|spelt|practis|grey"
)
_PER = (
    r"\b(?:tokens?|bytes?|experts?|steps?|rows?|samples?|items?|figures?|questions?|times|once|passes|completions?|"
    r"blocks?|KiB|MiB|ms|us|texts?|bits|kB|MB|s|lines?|slots?|processes|updates?|prompts?|problems?|programs?) an? "
    r"(?:token|step|second|minute|sequence|expert|batch|update|process|epoch|prompt|program|problem|file|row|slot|pass|"
    r"item|subject|device|byte|layer|sample|text|question|call|group|line|run|page|part)\b"
)
_NO = (
    r"(?i)(?<!\bthere )(?<!\bwhere )\b(?:is|are|was|were|has been|be) no (?!longer\b|more\b|less\b|fewer\b|other\b|"
    r"such\b|better\b|worse\b|larger\b|smaller\b|one\b|need\b|reason\b|doubt\b|way\b)[a-z]"
)
# What is looked for, where ("code": Python, "all": also Markdown, "strings": Python without comments), and the remedy.
KINDS = {
    "British spelling": (
        "all",
        rf"(?i)\b(?:un|re|de|pre)?(?:{_STEMS})",
        "American spelling: normalize, license",
    ),
    "error dialect": (
        "code",
        r"is not allowed, want|allowed (?:is|are)\b|(?:\{[^}]*\}|\w), want(?:ed)? (?!in\b|=)[\w{]",
        "setting: got X, expected Y",
    ),
    "is no": ("all", _NO, '"is not a"'),
    "a for per": ("all", _PER, '"tokens per second"'),
}
# Words of others, of data that is scored or trained on as it is, and of keys and options that are still read.
QUOTED = {
    "CHANGELOG.md": ("--licence",),
    "cli/benchmarks/attack_texts.py": ("it is an honour to talk",),
    "cli/card.py": ("--licence",),
    "cli/push.py": ("--licence",),
    "dev/made_sentences.py": ("our neighbours", "travelling by train", "neighbour", "without a licence"),
    "eval/metrics/refusal_rate/refusal_rate.py": ("Exaggerated Safety Behaviours",),
    "eval/tasks/mmlu_robust.py": ("My neighbour repainted", "A small grey cat"),
    "records/summary.py": ('"licence"',),
}


def room_files(room: str) -> list[Path]:
    if room == "docs":
        return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    return sorted(path for end in ("*.py", "*.md") for path in (ROOT / room).rglob(end))


def hits(text: str, pattern: str) -> list[str]:
    """Each hit with its line number and some of its line."""
    found = []
    for match in re.finditer(pattern, re.sub(r"https?://\S+", "", text)):
        line = text.count("\n", 0, match.start()) + 1
        found.append(f"{line}: {match[0]!r}")
    return found


def find(room: str, kind: str) -> list[str]:
    where, pattern, _ = KINDS[kind]
    found = []
    for path in room_files(room):
        if where == "code" and path.suffix != ".py":
            continue
        text = path.read_text(encoding="utf-8")
        for quoted in QUOTED.get(str(path.relative_to(ROOT)), ()):
            text = text.replace(quoted, "quoted")
        found += [f"{path.relative_to(ROOT)}:{hit}" for hit in hits(text, pattern)]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("room", ROOMS)
def test_words_are_plain_and_american(room, kind):
    found = find(room, kind)
    assert not found, f"write {KINDS[kind][2]}:\n" + "\n".join(found)


def test_each_quotation_is_still_there():
    for path, quoted in QUOTED.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        assert all(piece in text for piece in quoted), path


def test_surprises_are_few():
    places = [
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in room_files(room)
        if path.suffix == ".py"
        for _ in range(path.read_text(encoding="utf-8").count("Surprising:"))
    ]
    assert len(places) <= MOST_SURPRISES, f"{len(places)} places say Surprising:, at most {MOST_SURPRISES}: {places}"


@pytest.mark.parametrize(
    ("kind", "wrong", "right"),
    [
        (
            "British spelling",
            "it normalises the licence; behaviour",
            "it normalizes the license; behavior, size, promise",
        ),
        (
            "error dialect",
            'f"top_k: got {k}, wanted {low}"',
            'f"top_k: got {k}, expected {low}; users who wanted more"',
        ),
        ("error dialect", '"x: 1 is not allowed, want 2"', '"x: got 1, expected 2"'),
        ("is no", "a tweet is no proof", "it is no longer so; there is no proof; it is not a proof"),
        ("a for per", "512 tokens a step", "512 tokens per step; a step of 512 tokens"),
    ],
)
def test_the_search_tells_wrong_from_right(kind, wrong, right):
    assert hits(wrong, KINDS[kind][1])
    assert not hits(right, KINDS[kind][1])
