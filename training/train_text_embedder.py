"""Train the embedded sentence embedder and write it with its card.

Run once by hand: ``python -m deepseek_training.train_text_embedder SOURCE OUT``; about 20 s on one core. Pairs of a
prompt and its answer: MedQuAD (CC BY 4.0), PubMedQA (MIT), HH-RLHF (MIT), Taskmaster (CC BY 4.0), Self-Instruct's
seeds (Apache-2.0); pairs of neighbouring passages: the embedded books (public domain) and medicine. Contrastive: an
answer must be nearer to its own prompt than the other answers of a batch, which come from the same source. Every
prompt of `dialogues`' validation split is left out, as is everything the attack table is made of.
"""

import gzip
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from deepseek_training.build_dialogues import read_hh, read_medquad, read_taskmaster
from deepseek_training.text_data import read_rows
from deepseek_training.text_embedder import NUM_BUCKETS, NUM_DIMENSIONS, TextEmbedder, hash_text, word_bucket
from deepseek_training.words import content_words, split_words

EPOCHS, BATCH_SIZE, LEARNING_RATE, TEMPERATURE, SEED = 4, 256, 0.01, 0.07, 0
Pair = tuple[str, str]


def main(source: str, output: str) -> None:
    """Train, measure and write ``text_embedder.npz`` and ``text_embedder.json``.

    Args:
        source: Folder with the upstream files named in `build_dialogues`, ``sft/self_instruct_seed_tasks.jsonl.gz``,
            ``domain_medicine/pubmedqa_ori_pqal.json.gz`` and its ``pubmedqa_test_ground_truth.json``.
        output: Folder to write into.
    """
    folder = Path(source)
    sources = {name: list(dict.fromkeys(pairs)) for name, pairs in read_pairs(folder).items()}
    embedder = fit(sources)
    path = Path(output) / "text_embedder.npz"
    embedder.save(path)
    card = describe(TextEmbedder.load(path), {name: len(pairs) for name, pairs in sources.items()})
    path.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(card, indent=2))


def read_pairs(folder: Path) -> dict[str, list[Pair]]:
    """Return the training pairs of each source."""
    held_out = {_key(row["prompt"]) for row in read_rows("dialogues") if row["split"] == "validation"}
    sources = {
        "medquad": _training(read_medquad(folder), held_out),
        "hh": _training(read_hh(folder), held_out),
        "taskmaster": _training(read_taskmaster(folder), held_out),
        "pubmedqa": list(_read_pubmedqa(folder)),
        "seeds": list(_read_seeds(folder)),
    }
    for name in ("books", "medicine"):
        sources[name] = [
            pair for row in read_rows(name) if row["split"] == "train" for pair in neighbours(row["text"])
        ]
    return sources


def neighbours(text: str) -> Iterator[Pair]:
    """Yield each stretch of about 25 words with the 50 words that follow it."""
    words = text.split()
    for start in range(0, len(words) - 74, 75):
        yield " ".join(words[start : start + 25]), " ".join(words[start + 25 : start + 75])


def fit(sources: dict[str, list[Pair]]) -> TextEmbedder:
    """Return the embedder that best tells a prompt's answer from the others of its batch."""
    torch.manual_seed(SEED)
    bag = torch.nn.EmbeddingBag(NUM_BUCKETS, NUM_DIMENSIONS, mode="sum")
    torch.nn.init.normal_(bag.weight, std=0.1)
    optimizer = torch.optim.Adam(bag.parameters(), lr=LEARNING_RATE)
    hashed = {name: [(hash_text(a), hash_text(b)) for a, b in pairs] for name, pairs in sources.items()}
    batches = _batches(hashed)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=len(batches) * EPOCHS)
    for _ in range(EPOCHS):
        for batch in _batches(hashed):
            prompts, answers = (_embed(bag, [pair[side] for pair in batch]) for side in (0, 1))
            logits = prompts @ answers.T / TEMPERATURE
            target = torch.arange(len(batch))
            loss = torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(
                logits.T, target
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return TextEmbedder(bag.weight.detach().numpy(), count_rarity(sources))


def count_rarity(sources: dict[str, list[Pair]]) -> np.ndarray:
    """Return each word bucket's log of documents over documents with it, a pair counting as one document."""
    documents = [f"{a} {b}" for pairs in sources.values() for a, b in pairs]
    counts = np.zeros(NUM_BUCKETS)
    for document in documents:
        counts[list({word_bucket(word) for word in content_words(split_words(document))})] += 1
    return np.log((1 + len(documents)) / (1 + counts)).astype(np.float32)


def _batches(hashed: dict[str, list]) -> list[list]:
    """Shuffled batches, each of one source; a last one under 16 pairs is left out."""
    batches = []
    for pairs in hashed.values():
        pairs = [pair for pair in pairs if len(pair[0][0]) and len(pair[1][0])]
        for chosen in torch.randperm(len(pairs)).split(BATCH_SIZE):
            if len(chosen) >= 16:
                batches.append([pairs[i] for i in chosen])
    return [batches[i] for i in torch.randperm(len(batches))]


def _embed(bag: torch.nn.EmbeddingBag, texts: list[tuple[np.ndarray, np.ndarray]]) -> torch.Tensor:
    lengths = torch.tensor([0] + [len(buckets) for buckets, _ in texts[:-1]])
    buckets = torch.from_numpy(np.concatenate([buckets for buckets, _ in texts]))
    weights = torch.from_numpy(np.concatenate([weights for _, weights in texts]))
    return torch.nn.functional.normalize(bag(buckets, lengths.cumsum(0), per_sample_weights=weights), dim=-1)


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
        "model": f"sum of hashed word and piece vectors, {NUM_BUCKETS:,} x {NUM_DIMENSIONS}, 8-bit",
        "trained_by": "python -m deepseek_training.train_text_embedder",
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


def _read_seeds(folder: Path) -> Iterator[Pair]:
    with gzip.open(folder / "sft/self_instruct_seed_tasks.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            for instance in row["instances"][:1]:
                yield f"{row['instruction']} {instance['input']}", instance["output"]


def _key(text: str) -> str:
    return " ".join(split_words(re.sub(r"\s+", " ", text)))


if __name__ == "__main__":
    main(*sys.argv[1:])
