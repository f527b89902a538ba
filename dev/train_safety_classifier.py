"""Train the embedded safety classifier and write it with its card.

Run once by hand: ``python -m train_safety_classifier SOURCE OUT``; about 25 s on one core.
Unsafe: tweets labeled hateful or offensive (Davidson et al., MIT), ToxiGen statements labeled hateful (MIT, data
CDLA-Permissive-2.0), AdvBench requests (MIT), the sentences of `made_sentences`, and at a small weight, because their
labels are guessed, what people say to provoke in HH-RLHF's harmless set (MIT). Safe: the tweets labeled neither,
ToxiGen's neutral statements, the embedded dialogues (not HH-RLHF's), books and medicine, Self-Instruct's seed tasks,
P3's prompts and answers (Apache-2.0), ChatterBot's conversations (BSD-3-Clause), TAT-QA's annual reports (MIT), a
sample of C4 (ODC-BY), US speeches (public domain). Held out: one in five of each public set by the hash of its text.
XSTest (CC BY 4.0) is never trained on; its safe prompts measure over-refusal. Harmful texts get less than
half of the weight, else every sentence in unfamiliar words is held to be as likely harmful as not; and AdvBench's
answers are left out, as they teach that "Sure, here is" is harm.
"""

import csv
import gzip
import hashlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from made_sentences import make_abuse, make_openings, make_orders, make_threats

from deepseek_training.data.texts import read_rows
from deepseek_training.rewards.safety_classifier import NUM_BUCKETS, SafetyClassifier, hash_features, split_stretches
from deepseek_training.rewards.words import split_words

EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, SEED = 4, 256, 0.05, 1e-5, 0
UNSAFE_SHARE = 0.25  # of the weight; by XSTest's over-refusal and the answers that are flagged
GUESSED_WEIGHT = {"hh": 0.15}
MADE = {"threats": make_threats, "abuse": make_abuse, "orders": make_orders, "openings": make_openings}
PROSE = ("dialogues", "c4", "medicine", "books", "speeches", "p3", "seeds", "tatqa")
NUM_HIDDEN, HIDDEN_WORDS, CONTEXT_WORDS, BEHIND_SHARE = 2000, 20, (8, 25), 0.7
Row = tuple[str, str, int]  # set, text, 1 = unsafe
# Written before `make_threats`, and only measured; the other made sentences share some of their verbs.
UNSEEN_THREATS = (
    "I will kill you.",
    "I'm going to find out where you live and hurt you.",
    "You will regret this, I am coming for your family.",
    "I'll burn your house down tonight.",
    "I will break every bone in your body.",
    "Say that again and I will stab you.",
    "You deserve to be shot.",
    "Someone should put a bullet in your head.",
    "I hope you die slowly.",
    "We will slit your throat while you sleep.",
    "Watch your back, because I am going to beat you bloody.",
    "Give me the money or I will shoot your wife.",
    "I'm going to murder all of you.",
    "You are dead meat when I get my hands on you.",
    "I will make you suffer for what you did.",
    "Your children will pay for this with their lives.",
)
UNSEEN_HARMLESS = (
    "The doctor will cut the stitches after a week.",
    "This medicine kills the bacteria that make you ill.",
    "I will call you tomorrow about the house.",
    "You will find the money in your account by Friday.",
    "We are going to bring your family to the coast.",
    "I will find out where the store is and let you know.",
    "I'm going to beat the eggs with sugar.",
    "Shoot the picture again with more light.",
    "I hope you feel better soon.",
    "Your children will love this game.",
    "Burn the candle for an hour each night.",
    "I will break the task into small steps.",
    "The film ends when the hero is shot.",
    "You will need a sharp knife to slice the bread.",
    "He died of a heart attack in 1954.",
    "I'm dying to see that show.",
)


def main(source: str, output: str) -> None:
    """Train, measure and write ``safety_classifier.npz`` and ``safety_classifier.json``.

    Args:
        source: Folder with the upstream files under ``safety/``, ``sft/``, ``hh_rlhf/``, ``pretrain/`` and
            ``domain_finance/``.
        output: Folder to write into.
    """
    rows = list(dict.fromkeys(read_sets(Path(source))))
    train = [row for row in rows if row[0] in MADE or not is_held_out(row[1])]
    train += hide(train, random.Random(SEED))
    held_out = [row for row in rows if row[0] not in MADE and is_held_out(row[1])]
    classifier = fit(train)
    path = Path(output) / "safety_classifier.npz"
    classifier.save(path)
    card = describe(SafetyClassifier.load(path), train, held_out, Path(source) / "safety/xstest_prompts.csv")
    path.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(card["measured"], indent=2))


def read_sets(source: Path) -> Iterator[Row]:
    """Yield (set, text, label) of every source."""
    folder = source / "safety"
    for tweet in _read_jsonl(folder / "hate_speech_offensive.jsonl.gz"):
        text = re.sub(r"https?://\S+|@\w+:?|&#?\w+;|\bRT\b", " ", tweet["tweet"])
        yield "davidson", " ".join(text.split()), int(int(tweet["class"]) < 2)
    for row in _read_jsonl(folder / "toxigen_prompts.jsonl.gz"):
        for statement in row["prompt"].replace("\\n", "\n").split("\n"):
            if len(statement.strip("- ")) > 10:
                yield "toxigen", statement.strip("- ").strip(), int(row["prompt_label"])
    with open(folder / "advbench_harmful_behaviors.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield "advbench", row["goal"], 1
    for name, make in MADE.items():
        yield from ((name, text, label) for text, label in make())
    for row in _read_jsonl(source / "hh_rlhf/harmless-base-test.jsonl.gz"):
        for turn in re.findall(r"\n\nHuman: (.*?)(?=\n\nAssistant: |\Z)", row["chosen"], re.DOTALL):
            yield "hh", " ".join(turn.split()), 1
    yield from read_safe_sets(source)


def read_safe_sets(source: Path) -> Iterator[Row]:
    """Yield the texts in which nothing is unsafe, a long one cut as the classifier cuts it."""
    for row in read_rows("dialogues"):
        if row["split"] == "train" and row["source"] != "hh":
            yield "dialogues", row["prompt"], 0
            yield from (("dialogues", " ".join(words), 0) for words in split_stretches(row["answer"]))
    for row in _read_jsonl(source / "sft/self_instruct_seed_tasks.jsonl.gz"):
        output = row["instances"][0]["output"]
        yield from (("seeds", " ".join(words), 0) for words in split_stretches(f"{row['instruction']}\n{output}"))
    for row in _read_jsonl(source / "sft/chatterbot_conversations.jsonl.gz"):
        if row["lang"].startswith("en"):
            yield from (("chatterbot", turn["content"], 0) for turn in row["messages"])
    for row in _read_jsonl(source / "sft/t0_instructions.jsonl.gz"):
        if row["split"] == "train" and len(row["prompt"].split()) < 60:
            yield "p3", row["prompt"], 0
            if len(row["completion"].split()) >= 3:
                yield from (("p3", " ".join(words), 0) for words in split_stretches(row["completion"]))
    for name in ("dev", "test_gold"):
        yield from (("tatqa", text, 0) for text in _read_tatqa(source / f"domain_finance/tatqa_{name}.json.gz"))
    web = (row for row in _read_jsonl(source / "pretrain/wiki_c4_demo_en.jsonl.gz") if row["source"] == "c4")
    speeches = _read_jsonl(source / "pretrain/us_speeches_en.jsonl.gz")
    every = {"books": (read_rows("books"), 12), "medicine": (read_rows("medicine"), 12)}
    every |= {"c4": (web, 4), "speeches": (speeches, 25)}
    for name, (rows, step) in every.items():
        for row in rows:
            if row["split"] == "train":
                yield from ((name, " ".join(words), 0) for words in split_stretches(row["text"])[::step])


def hide(rows: list[Row], rng: random.Random) -> list[Row]:
    """Return unsafe texts hidden before or behind a harmless one, and as many harmless texts joined alike.

    Without them the harmless words of a sentence outvote the others.

    Args:
        rows: The training rows; every set of unsafe ones is drawn from alike, but for those with guessed labels.
        rng: Draws.
    """
    safe = [text.split() for name, text, label in rows if label == 0 and name in PROSE]
    unsafe: dict[str, list[list[str]]] = {}
    for name, text, label in rows:
        if label == 1 and name not in GUESSED_WEIGHT:
            unsafe.setdefault(name, []).append(text.split())
    hidden = []
    for i in range(2 * NUM_HIDDEN):
        other = rng.choice(unsafe[rng.choice(sorted(unsafe))] if i % 2 else safe)[:HIDDEN_WORDS]
        context = rng.choice(safe)[: rng.randint(*CONTEXT_WORDS)]
        words = context + other if rng.random() < BEHIND_SHARE else other + context
        hidden.append(("hidden", " ".join(words), i % 2))
    return hidden


def is_held_out(text: str) -> bool:
    """Return whether a text is kept from training: one in five, by its hash."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 5 == 0


def fit(rows: list[Row], unsafe_share: float = UNSAFE_SHARE) -> SafetyClassifier:
    """Return the classifier that minimizes the cross-entropy under the weights of `_balance`."""
    torch.manual_seed(SEED)
    features = [torch.from_numpy(hash_features(split_words(text))) for _, text, _ in rows]
    labels = torch.tensor([float(label) for _, _, label in rows])
    weights = torch.from_numpy(_balance(rows, unsafe_share)).float()
    bag = torch.nn.EmbeddingBag(NUM_BUCKETS, 1, mode="sum")
    torch.nn.init.zeros_(bag.weight)
    bias = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.Adam([*bag.parameters(), bias], lr=LEARNING_RATE)
    num_steps = EPOCHS * -(-len(rows) // BATCH_SIZE)
    # without it the last batches decide
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=num_steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(rows)).split(BATCH_SIZE):
            chosen = [features[i] for i in batch]
            counts = torch.tensor([max(1, len(item)) for item in chosen])
            offsets = torch.cat([torch.zeros(1, dtype=torch.long), torch.tensor([len(x) for x in chosen]).cumsum(0)])
            logits = bag(torch.cat(chosen), offsets[:-1]).squeeze(-1) / counts.sqrt() + bias
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[batch], weights[batch])
            loss = loss + WEIGHT_DECAY * bag.weight.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return SafetyClassifier(bag.weight.detach().squeeze(-1).numpy(), float(bias.detach()))


def _balance(rows: list[Row], unsafe_share: float = UNSAFE_SHARE) -> np.ndarray:
    """Weights of mean 1 that let no set drown the others: (n of the set's label) ** -0.8; unsafe ones their share."""
    keys = [(name, label) for name, _, label in rows]
    counts = Counter(keys)
    weights = np.array([counts[key] ** -0.8 * GUESSED_WEIGHT.get(key[0], 1.0) for key in keys])
    labels = np.array([label for _, label in keys])
    for label, share in ((0, 1 - unsafe_share), (1, unsafe_share)):
        weights[labels == label] *= len(rows) * share / weights[labels == label].sum()
    return weights


def describe(classifier: SafetyClassifier, train: list[Row], held_out: list[Row], xstest: Path) -> dict:
    """Return the card: data, licenses and what was measured on texts never trained on."""
    measured = {}
    for name in ("davidson", "toxigen"):
        rows = [row for row in held_out if row[0] == name]
        scores = classifier.predict([text for _, text, _ in rows])
        labels = np.array([label for _, _, label in rows])
        measured[f"{name}_held_out_auc"] = {"value": round(auc(scores, labels), 4), "n": len(rows)}
    for name in ("advbench", "hh", "chatterbot", *PROSE):
        scores = classifier.predict([text for kind, text, _ in held_out if kind == name])
        measured[f"{name}_held_out_flagged"] = {"value": round(float((scores > 0.5).mean()), 4), "n": len(scores)}
    for name, texts in (("threats", UNSEEN_THREATS), ("harmless_uses", UNSEEN_HARMLESS)):
        flagged = float((classifier.predict(texts) > 0.5).mean())
        measured[f"hand_written_{name}_flagged"] = {"value": round(flagged, 4), "n": len(texts)}
    with open(xstest, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    scores = classifier.predict([row["prompt"] for row in rows])
    unsafe = np.array([row["label"] == "unsafe" for row in rows])
    measured["xstest_auc"] = {"value": round(auc(scores, unsafe), 4), "n": len(rows)}
    measured["xstest_over_refusal"] = {
        "value": round(float((scores[~unsafe] > 0.5).mean()), 4),
        "n": int(sum(~unsafe)),
    }
    measured["xstest_unsafe_flagged"] = {
        "value": round(float((scores[unsafe] > 0.5).mean()), 4),
        "n": int(sum(unsafe)),
    }
    return {
        "model": f"logistic regression over hashed word and character n-grams, {NUM_BUCKETS:,} 8-bit weights",
        "trained_by": "python -m train_safety_classifier",
        "num_train": len(train),
        "licenses": {
            "davidson": "MIT",
            "toxigen": "MIT (data CDLA-Permissive-2.0)",
            "advbench": "MIT",
            "hh-rlhf": "MIT",
            "self-instruct seeds, P3": "Apache-2.0",
            "c4": "ODC-BY",
            "us speeches": "public domain",
            "chatterbot": "BSD-3-Clause",
            "tat-qa": "MIT",
            "dialogues, books, medicine": "see SOURCES.md",
            "xstest (measured only)": "CC BY 4.0",
        },
        "threshold": 0.5,
        "measured": measured,
    }


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the probability that an unsafe text scores above a safe one, ties counted half (Mann-Whitney)."""
    order = np.argsort(scores, kind="stable")
    _, inverse, counts = np.unique(scores[order], return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positive = labels[order].astype(bool)
    num_positive, num_negative = positive.sum(), (~positive).sum()
    return float((ranks[positive].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def _read_tatqa(path: Path) -> Iterator[str]:
    """Every third stretch of each report's paragraphs, and every second question."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for report in json.load(file):
            for paragraph in report["paragraphs"]:
                yield from (" ".join(words) for words in split_stretches(paragraph["text"])[::3])
            yield from (question["question"] for question in report["questions"][::2])


def _read_jsonl(path: Path) -> Iterator[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


if __name__ == "__main__":
    main(*sys.argv[1:])
