"""Train the embedded safety classifier and write it with its card.

Run once by hand: ``python -m deepseek_training.train_safety_classifier SOURCE OUT``; about a minute on one core.
Unsafe: tweets labelled hateful or offensive (Davidson et al., MIT), ToxiGen statements labelled hateful (MIT, data
CDLA-Permissive-2.0), AdvBench requests and their openings (MIT). Safe: the tweets labelled neither, ToxiGen's neutral
statements, the embedded dialogues (not HH-RLHF's), books and medicine, Self-Instruct's seed tasks (Apache-2.0) and
ChatterBot's conversations (BSD-3-Clause). Held out: one in five of each by the hash of
its text. XSTest (CC BY 4.0) is never trained on; its safe prompts measure over-refusal.
"""

import csv
import gzip
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from deepseek_training.safety_classifier import NUM_BUCKETS, SafetyClassifier, hash_features, split_stretches
from deepseek_training.text_data import read_rows
from deepseek_training.words import split_words

EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, SEED = 4, 256, 0.05, 1e-5, 0
Row = tuple[str, str, int]  # set, text, 1 = unsafe


def main(source: str, output: str) -> None:
    """Train, measure and write ``safety_classifier.npz`` and ``safety_classifier.json``.

    Args:
        source: Folder with the upstream files under ``safety/`` and ``sft/``.
        output: Folder to write into.
    """
    rows = list(dict.fromkeys(read_sets(Path(source))))
    train = [row for row in rows if not is_held_out(row[1])]
    held_out = [row for row in rows if is_held_out(row[1])]
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
            yield "advbench", row["target"], 1
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
    for row in read_rows("books"):
        if row["split"] == "train":
            yield from (("books", " ".join(words), 0) for words in split_stretches(row["text"])[::12])
    for row in read_rows("medicine"):
        if row["split"] == "train":
            yield from (("medicine", " ".join(words), 0) for words in split_stretches(row["text"])[::12])


def is_held_out(text: str) -> bool:
    """Return whether a text is kept from training: one in five, by its hash."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 5 == 0


def fit(rows: list[Row]) -> SafetyClassifier:
    """Return the classifier that minimises the cross-entropy under the weights of `_balance`."""
    torch.manual_seed(SEED)
    features = [torch.from_numpy(hash_features(split_words(text))) for _, text, _ in rows]
    labels = torch.tensor([float(label) for _, _, label in rows])
    weights = torch.from_numpy(_balance(rows)).float()
    bag = torch.nn.EmbeddingBag(NUM_BUCKETS, 1, mode="sum")
    torch.nn.init.zeros_(bag.weight)
    bias = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.Adam([*bag.parameters(), bias], lr=LEARNING_RATE)
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
    return SafetyClassifier(bag.weight.detach().squeeze(-1).numpy(), float(bias.detach()))


def _balance(rows: list[Row]) -> np.ndarray:
    """Weights of mean 1 that let no set drown the others: (n of the set's label) ** -0.8, and each label alike."""
    keys = [(name, label) for name, _, label in rows]
    counts = Counter(keys)
    weights = np.array([counts[key] ** -0.8 for key in keys])
    labels = np.array([label for _, label in keys])
    for label in (0, 1):
        weights[labels == label] *= len(rows) / 2 / weights[labels == label].sum()
    return weights


def describe(classifier: SafetyClassifier, train: list[Row], held_out: list[Row], xstest: Path) -> dict:
    """Return the card: data, licences and what was measured on texts never trained on."""
    measured = {}
    for name in ("davidson", "toxigen"):
        rows = [row for row in held_out if row[0] == name]
        scores = classifier.predict([text for _, text, _ in rows])
        labels = np.array([label for _, _, label in rows])
        measured[f"{name}_held_out_auc"] = {"value": round(auc(scores, labels), 4), "n": len(rows)}
    for name in ("advbench", "dialogues", "seeds", "chatterbot", "books", "medicine"):
        scores = classifier.predict([text for kind, text, _ in held_out if kind == name])
        measured[f"{name}_held_out_flagged"] = {"value": round(float((scores > 0.5).mean()), 4), "n": len(scores)}
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
        "model": "logistic regression over hashed word and character n-grams, 65,536 8-bit weights",
        "trained_by": "python -m deepseek_training.train_safety_classifier",
        "num_train": len(train),
        "licences": {
            "davidson": "MIT",
            "toxigen": "MIT (data CDLA-Permissive-2.0)",
            "advbench": "MIT",
            "self-instruct seeds": "Apache-2.0",
            "chatterbot": "BSD-3-Clause",
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


def _read_jsonl(path: Path) -> Iterator[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


if __name__ == "__main__":
    main(*sys.argv[1:])
