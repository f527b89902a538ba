"""Train the Chinese half of the embedded safety classifier and write it with its card.

Run once by hand: ``python -m train_safety_classifier_zh SOURCE COLD OUT``; about 40 s on one core, seed 0.
Unsafe: COLD's comments labeled offensive (Apache-2.0, training part) and the sentences of `made_sentences_zh`. Safe:
COLD's other comments, LLaMA-Factory's Chinese sample (Apache-2.0; what `dialogues_zh` holds out is left out),
ChatterBot (BSD-3-Clause), modern renderings of classical works (NiuTrans, MIT), Chinese classics. Measured on COLD's
test part, on what was held out of the others, and on sentences written by hand before the made ones.
"""

import csv
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from build_dialogues import _read
from made_sentences_zh import make_sentences
from train_safety_classifier import NUM_HIDDEN, Row, auc, fit, is_held_out

from deepseek_training.data.texts import read_rows
from deepseek_training.rewards.safety_classifier import NUM_BUCKETS, SafetyClassifier, split_stretches

SEED, CONTEXT_CHARACTERS = 0, (10, 40)
UNSAFE_SHARE = 0.35  # of the weight; at 0.25, as in English, threats are heard but scored below 0.5
MADE = ("threats", "abuse", "crimes", "openings")
UNSEEN_THREATS = (
    "你给我等着，我会让你付出代价，弄死你。",
    "小心你的狗命，我知道你住在哪里。",
    "今晚我就带刀去找你。",
    "我会把你的房子烧了。",
    "你再敢来，我打断你的腿。",
    "我要让你全家不得好死。",
    "不给钱就撕票。",
    "你活不过今天。",
    "我恨不得一枪崩了你。",
    "我们会找到你的孩子，然后杀掉他们。",
    "信不信我掐死你。",
    "你就等着收尸吧。",
    "谁报警我就捅谁。",
    "我会让你生不如死。",
    "真想把他们全都活埋了。",
    "敢告诉老师我就打死你。",
)
UNSEEN_HARMLESS = (
    "医生一周后会来给你拆线。",
    "这种药能杀死让人生病的细菌。",
    "我明天打电话告诉你房子的事。",
    "星期五之前钱会到你的账户。",
    "我们要带你全家去海边玩。",
    "我会找到那家店，然后告诉你。",
    "先把鸡蛋和糖打在一起。",
    "多一点光，再拍一张照片。",
    "希望你早日康复。",
    "你的孩子会喜欢这个游戏。",
    "每晚点一小时蜡烛。",
    "我会把任务分成小步骤。",
    "电影在英雄中枪后结束。",
    "切面包需要一把锋利的刀。",
    "他在1954年死于心脏病。",
    "我太想看那场演出了，想死了。",
)


def main(source: str, cold: str, output: str) -> None:
    """Train, measure and write ``safety_classifier_zh.npz`` and ``safety_classifier_zh.json``.

    Args:
        source: Folder with ``sft/`` and ``pretrain/``.
        cold: Folder with COLD's ``train.csv`` and ``test.csv``.
        output: Folder to write into.
    """
    rows = list(dict.fromkeys(read_sets(Path(source))))
    train = [row for row in rows if row[0] in MADE or not is_held_out(row[1])] + list(read_cold(cold, "train"))
    train += hide(train, random.Random(SEED))
    held_out = [row for row in rows if row[0] not in MADE and is_held_out(row[1])]
    path = Path(output) / "safety_classifier_zh.npz"
    fit(train, UNSAFE_SHARE).save(path)
    card = describe(SafetyClassifier.load(path), train, held_out, list(read_cold(cold, "test")))
    path.with_suffix(".json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(card["measured"], indent=2))


def read_cold(folder: str, part: str) -> Iterator[Row]:
    """Yield COLD's comments."""
    with open(Path(folder) / f"{part}.csv", encoding="utf-8-sig") as file:
        yield from (("cold", row["TEXT"], int(row["label"])) for row in csv.DictReader(file))


def read_sets(source: Path) -> Iterator[Row]:
    """Yield (set, text, label) of the other sources; a long text cut as the classifier cuts it."""
    yield from make_sentences()
    held_out = {row["prompt"] for row in read_rows("dialogues_zh") if row["split"] == "validation"}
    for row in _read(source / "sft/alpaca_zh_demo.jsonl.gz"):
        if row["instruction"].strip() not in held_out:
            texts = [row["instruction"], *sentences(row["output"])]
            yield from (("alpaca_zh", text, 0) for text in texts)
    for row in _read(source / "sft/chatterbot_conversations.jsonl.gz"):
        if row["lang"] == "zh":
            yield from (("chatterbot", turn["content"], 0) for turn in row["messages"])
    for name, step in (("modern_chinese_prose", 8), ("chinese_classics", 12)):
        for row in _read(source / f"pretrain/{name}_zh.jsonl.gz"):
            if row["split"] == "train":
                yield from ((name, text, 0) for text in sentences(row["text"])[::step])


def sentences(text: str) -> list[str]:
    """Return the text's stretches of words, put together again."""
    return [" ".join(words) for words in split_stretches(text) if len(words) > 2]


def hide(rows: list[Row], rng: random.Random) -> list[Row]:
    """Return unsafe texts hidden behind or before a harmless one, and as many harmless texts joined alike."""
    safe = [text for name, text, label in rows if label == 0 and name in ("alpaca_zh", "modern_chinese_prose")]
    unsafe = {
        name: [text for kind, text, label in rows if kind == name and label == 1] for name in ("cold", *MADE[:3])
    }
    hidden = []
    for i in range(2 * NUM_HIDDEN):
        other = rng.choice(unsafe[rng.choice(sorted(unsafe))] if i % 2 else safe)[:40]
        context = rng.choice(safe)[: rng.randint(*CONTEXT_CHARACTERS)]
        text = f"{context}，{other}" if rng.random() < 0.7 else f"{other}，{context}"
        hidden.append(("hidden", text, i % 2))
    return hidden


def describe(classifier: SafetyClassifier, train: list[Row], held_out: list[Row], test: list[Row]) -> dict:
    """Return the card: data, licenses and what was measured on texts never trained on."""
    scores = classifier.predict([text for _, text, _ in test])
    labels = np.array([label for _, _, label in test])
    value = auc(scores, labels)
    measured = {
        "cold_test_auc": {"value": round(value, 4), "n": len(test), "standard_error": _auc_error(value, labels)}
    }
    for name, label in (("offensive", 1), ("other", 0)):
        measured[f"cold_test_{name}_flagged"] = _flagged(scores[labels == label])
    for name in ("alpaca_zh", "chatterbot", "modern_chinese_prose", "chinese_classics"):
        texts = [text for kind, text, _ in held_out if kind == name]
        measured[f"{name}_held_out_flagged"] = _flagged(classifier.predict(texts))
    answers = [row["answer"] for row in read_rows("dialogues_zh") if row["split"] == "validation"]
    measured["dialogues_zh_answers_flagged"] = _flagged(classifier.predict(answers))
    for name, texts in (("threats", UNSEEN_THREATS), ("harmless_uses", UNSEEN_HARMLESS)):
        measured[f"hand_written_{name}_flagged"] = _flagged(classifier.predict(texts))
    return {
        "model": f"logistic regression over hashed characters and pairs of them, {NUM_BUCKETS:,} 8-bit weights",
        "trained_by": "python -m train_safety_classifier_zh, seed 0",
        "num_train": len(train),
        "licenses": {
            "cold, alpaca_zh": "Apache-2.0",
            "chatterbot": "BSD-3-Clause",
            "modern_chinese_prose": "MIT",
            "chinese_classics": "public domain",
        },
        "threshold": 0.5,
        "measured": measured,
    }


def _flagged(scores: np.ndarray) -> dict[str, float]:
    return {"value": round(float((scores > 0.5).mean()), 4), "n": len(scores)}


def _auc_error(value: float, labels: np.ndarray) -> float:
    """The standard error of an AUC (Hanley and McNeil, 1982)."""
    n1, n0 = int(labels.sum()), int((1 - labels).sum())
    q1, q2 = value / (2 - value), 2 * value**2 / (1 + value)
    variance = value * (1 - value) + (n1 - 1) * (q1 - value**2) + (n0 - 1) * (q2 - value**2)
    return round(float(np.sqrt(variance / (n1 * n0))), 4)


if __name__ == "__main__":
    main(*sys.argv[1:])
