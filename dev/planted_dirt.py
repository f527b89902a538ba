"""A thousand documents with known faults, for measuring the filters of ``deepseek-moe data``.

    python dev/planted_dirt.py planted.jsonl            # documents, each with its fault
    python dev/planted_dirt.py --table planted.jsonl runs/planted    # precision and recall of a finished run

The clean ones are embedded medicine, books and Chinese answers; every fault is made from others of them, so that
nothing but the fault tells them apart. Toxic and foreign sentences were written for this file; no classifier was
trained on them.
"""

import argparse
import collections
import gzip
import json
import random
from pathlib import Path
from typing import Any

from deepseek_eval.tasks.catalogue import find_task
from deepseek_training.data.cleaning.repair import repair
from deepseek_training.data.texts import load_texts

SEED = 0
NUM_DOCUMENTS, PER_KIND = 1000, 40
# Each fault with the filter that is to find it; letters at random and symbols are in no wanted language either.
ALSO = {"letters at random": "language", "symbols": "language"}
KINDS = {
    "mojibake": "repair",
    "wrong language": "language",
    "boilerplate": "boilerplate",
    "letters at random": "quality",
    "words shuffled": "quality",
    "a line repeated": "quality",
    "symbols": "quality",
    "a quarter of letters wrong": "quality",
    "toxic": "toxicity",
    "benchmark item": "contamination",
    "personal data": "personal_data",
    "near-duplicate": "near-duplicates",
}
FOREIGN = {
    "de": (
        "Der Arzt untersucht das Kind am Morgen.",
        "Die Tabletten werden nach dem Essen genommen.",
        "Im Winter sind viele Menschen erk\u00e4ltet.",
        "Das Krankenhaus liegt am Rand der Stadt.",
        "Wer Fieber hat, soll viel Wasser trinken.",
        "Die Schwester misst jeden Abend den Blutdruck.",
        "Nach der Operation darf er wieder gehen.",
    ),
    "fr": (
        "Le m\u00e9decin examine l'enfant chaque matin.",
        "Les comprim\u00e9s se prennent apr\u00e8s le repas.",
        "En hiver, beaucoup de gens sont enrhum\u00e9s.",
        "L'h\u00f4pital se trouve au bord de la ville.",
        "Quand on a de la fi\u00e8vre, il faut boire de l'eau.",
        "L'infirmi\u00e8re mesure la tension tous les soirs.",
        "Apr\u00e8s l'op\u00e9ration, il peut de nouveau marcher.",
    ),
    "es": (
        "El m\u00e9dico examina al ni\u00f1o por la ma\u00f1ana.",
        "Las pastillas se toman despu\u00e9s de comer.",
        "En invierno mucha gente est\u00e1 resfriada.",
        "El hospital est\u00e1 a las afueras de la ciudad.",
        "Quien tiene fiebre debe beber mucha agua.",
        "La enfermera mide la tensi\u00f3n todas las noches.",
        "Despu\u00e9s de la operaci\u00f3n puede volver a caminar.",
    ),
    "pt": (
        "O m\u00e9dico examina a crian\u00e7a pela manh\u00e3.",
        "Os comprimidos tomam-se depois das refei\u00e7\u00f5es.",
        "No inverno muitas pessoas ficam constipadas.",
        "O hospital fica nos arredores da cidade.",
        "Quem tem febre deve beber muita \u00e1gua.",
        "A enfermeira mede a tens\u00e3o todas as noites.",
        "Depois da opera\u00e7\u00e3o ele pode voltar a andar.",
    ),
}
ABUSE = (
    "You are a filthy idiot and everyone on this street would be happier without you.",
    "These immigrants are vermin, they should all be beaten and thrown out.",
    "I hope that somebody breaks your legs, you disgusting piece of trash.",
    "Women like her are stupid whores who deserve every slap they get.",
    "We will come to your house tonight and burn it down with you inside.",
    "Shut up, you worthless retard, nobody wants to hear your lies.",
    "All of them are criminals and animals, shoot them at the border.",
    "Go kill yourself, you ugly pig, the world will not miss you.",
    "That religion breeds nothing but murderers, wipe them out.",
    "Old people are useless parasites, let them die.",
    "He is a dirty faggot and I will punch him in the face.",
    "I will stab you in the neck if you speak to my sister again.",
)
NOTICES = (
    "Accept all cookies to continue reading this page",
    "Home | About us | Contact | Subscribe to our newsletter",
    "Copyright 2021 Example Media Group. All rights reserved.",
)


def plant(seed: int = SEED) -> list[dict[str, Any]]:
    """Return the documents in random order: ``text``, ``kind`` ("" for a clean one), and ``clean`` where one is meant.

    Args:
        seed: Of the choice and of the faults.
    """
    rng = random.Random(seed)
    # Its held-out abstracts are those of PubMedQA's test questions, which contamination rightly drops.
    medicine = [text[:2500] for text in load_texts("medicine", "train") if len(text) > 500]
    rng.shuffle(medicine)
    pieces = (text[i : i + 2000] for text in load_texts("books", "all") for i in range(20_000, 60_000, 2000))
    # Some of the books have faults of their own: bare carriage returns, zero-width spaces.
    books = [piece for piece in pieces if piece.strip() and repair(piece)[0] == piece]
    chinese = [text for text in load_texts("dialogues_zh", "all", column="answer") if len(text) > 50]
    rows = []
    for kind in KINDS:
        rows += [{"kind": kind, **_faulty(kind, medicine.pop(), number, rng)} for number in range(PER_KIND)]
    num_clean = NUM_DOCUMENTS - len(rows)
    clean = [*rng.sample(books, 100), *rng.sample(chinese, 100)]
    clean += medicine[: num_clean - len(clean)]
    rows += [{"kind": "", "text": text} for text in clean]
    copied = rng.sample(medicine[: num_clean - 200], PER_KIND)
    for row, text in zip([row for row in rows if row["kind"] == "near-duplicate"], copied, strict=True):
        row["text"], row["of"] = _edit(text, 0.02, rng), text
    rng.shuffle(rows)
    return rows


def _faulty(kind: str, text: str, number: int, rng: random.Random) -> dict[str, Any]:
    words = text.split(" ")
    if kind == "mojibake":
        clean = text.replace(" the ", " the \u2018", 1).replace(". ", "\u2019. ", 1) + " \u2013 caf\u00e9"
        return {"text": clean.encode().decode("cp1252", "ignore"), "clean": clean}
    if kind == "wrong language":
        sentences = FOREIGN[list(FOREIGN)[number % len(FOREIGN)]]
        return {"text": " ".join(rng.sample(sentences, 5))}
    if kind == "boilerplate":
        return {"text": "\n".join([NOTICES[1], text, *rng.sample((NOTICES[0], NOTICES[2]), 1)]), "clean": text}
    if kind == "letters at random":
        return {"text": "".join(rng.choice("abcdefghijklmnopqrstuvwxyz   ") for _ in range(800))}
    if kind == "words shuffled":
        return {"text": " ".join(rng.sample(words, len(words)))}
    if kind == "a line repeated":
        return {"text": "\n".join([" ".join(words[:15])] * 20)}
    if kind == "symbols":
        return {"text": "".join(rng.choice("<>{}[]()|-_=+*#&^%$@!~;:/ 0123456789ab") for _ in range(800))}
    if kind == "a quarter of letters wrong":
        wrong = (rng.choice("abcdefghijklmnopqrstuvwxyz") if c.isalpha() and rng.random() < 0.25 else c for c in text)
        return {"text": "".join(wrong)}
    if kind == "toxic":
        return {"text": " ".join([*rng.sample(ABUSE, 7), text[:150]])}
    if kind == "benchmark item":
        return {"text": f"{text[:400]}\n{_item(number)}\n{text[400:800]}"}
    if kind == "personal data":
        datum = personal_datum(number, rng)
        place = len(words) // 2
        return {"text": " ".join([*words[:place], datum[0], *words[place:]]), "secret": datum[1]}
    return {"text": text}


def _item(number: int) -> str:
    """Of MMLU's questions with 20 words or more one in a hundred, of HumanEval's problems every fourth."""
    if number % 2:
        return str(list(find_task("humaneval").build_items(0, None, None))[number * 4].prompt)
    questions = [item.prompt.removeprefix(item.context) for item in find_task("mmlu").build_items(0, 4, None)]
    long = [question for question in questions if len(question.partition("\nA. ")[0].split()) >= 20]
    return long[number * 2].partition("\nA. ")[0].upper()


def personal_datum(number: int, rng: random.Random) -> tuple[str, str]:
    """Return a sentence with one personal datum, and the datum.

    Args:
        number: Which kind, in turn.
        rng: Draws the digits.
    """

    def digits(count: int) -> str:
        return "".join(rng.choices("0123456789", k=count))

    card = "4" + digits(14)
    doubled = sum(sum(divmod(int(d) * (2 if i % 2 == 0 else 1), 10)) for i, d in enumerate(reversed(card)))
    card += str(-doubled % 10)
    account = digits(18)
    check = 98 - int(account + "131400") % 97
    kinds = (
        ("Write to {}.", f"p{digits(3)}.miller@clinic{digits(1)}.example.org"),
        ("Call {} for an appointment.", f"({rng.randint(201, 989)}) 555-{digits(4)}"),
        ("It was paid by card {}.", " ".join(card[i : i + 4] for i in range(0, 16, 4))),
        ("Transfer the sum to {}.", f"DE{check:02d} " + " ".join(account[i : i + 4] for i in range(0, 18, 4))),
        (
            "Her social security number is {}.",
            f"{rng.randint(100, 665)}-{rng.randint(10, 99)}-{rng.randint(1000, 9999)}",
        ),
        ("He was admitted under MRN: {}.", f"{rng.randint(1, 9)}{digits(7)}"),
        ("The log shows {} at noon.", ".".join(str(rng.randint(11, 250)) for _ in range(4))),
        ("Reach us at {} on weekdays.", f"+44 20 {digits(4)} {digits(4)}"),
    )
    sentence, datum = kinds[number % len(kinds)]
    return sentence.format(datum), datum


def _edit(text: str, share: float, rng: random.Random) -> str:
    words = text.split(" ")
    for place in rng.sample(range(len(words)), max(1, round(share * len(words)))):
        words[place] = rng.choice(words)
    return " ".join(words)


def score(rows: list[dict[str, Any]], run: Path) -> dict[str, dict[str, float]]:
    """Return of each fault how many were found by their filter and what else that filter hit.

    Args:
        rows: From `plant`, as they were written.
        run: The finished run, with a sample of everything that was dropped or changed (``num_samples``).
    """
    kept = {}
    for path in sorted((run / "data").glob("*.gz")):
        for line in gzip.decompress(path.read_bytes()).decode().split("\n")[:-1]:
            row = json.loads(line)
            kept[row["line"]] = row["text"]
    hit: dict[str, set[int]] = collections.defaultdict(set)
    for path in (run / "dropped").glob("*.jsonl"):
        hit[path.stem.replace("_", " ")] |= {json.loads(line)["line"] for line in path.read_text().splitlines()}
    # Of a pair of near-duplicates the first stays, planted or not: a clean text that has one may be the one to go.
    pairs = {row["of"]: number for number, row in enumerate(rows, start=1) if "of" in row}
    twins = {number: pairs[row["text"]] for number, row in enumerate(rows, start=1) if row["text"] in pairs}
    hit["near-duplicates"] = {twins.get(line, line) for line in hit["near-duplicates"]}
    found = {}
    for kind, filter_name in KINDS.items():
        lines = [number for number, row in enumerate(rows, start=1) if row["kind"] == kind]
        hits = hit[filter_name.replace("_", " ")]
        alike = {other for other in KINDS if filter_name in (KINDS[other], ALSO.get(other))}
        found_by = hits | hit[ALSO.get(kind, filter_name).replace("_", " ")]
        right = [line for line in lines if _is_right(rows[line - 1], line, found_by, kept)]
        found[kind] = {
            "filter": filter_name,
            "recall": len(right) / len(lines),
            "precision": sum(rows[line - 1]["kind"] in alike for line in hits) / max(1, len(hits)),
        }
    clean = [number for number, row in enumerate(rows, start=1) if not row["kind"]]
    lost = [line for line in clean if line not in kept and line not in twins]
    found["clean"] = {"lost": len(lost) / len(clean), "n": len(clean)}
    return found


def _is_right(row: dict[str, Any], line: int, hits: set[int], kept: dict[int, str]) -> bool:
    """Whether a filter did with a planted document what it is for."""
    if row["kind"] in ("mojibake", "boilerplate"):
        return line in kept and kept[line].strip() == row["clean"].strip()
    if row["kind"] == "personal data":
        return line in kept and row["secret"] not in kept[line]
    return line in hits


def main() -> None:
    """Write the documents, or print the table of a run on them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        args.documents.write_text("".join(json.dumps(row) + "\n" for row in plant()), encoding="utf-8")
        return
    rows = [json.loads(line) for line in args.documents.read_text(encoding="utf-8").splitlines()]
    for kind, figures in score(rows, args.run).items():
        print(
            f"| {kind} | "
            + " | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in figures.values())
            + " |"
        )


if __name__ == "__main__":
    main()
