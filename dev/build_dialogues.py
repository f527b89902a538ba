"""Build the embedded ``dialogues`` set: first user turns with one good reply each.

Run once by hand, ``python -m build_dialogues SOURCE OUT``, from a folder holding the three public
files named in `main`. A prompt is held out by its topic (MedQuAD's own split) or by the hash of its text,
never by position, and a held-out prompt whose normalized text also occurs among the training prompts is dropped.
"""

import gzip
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_PROMPT_CHARS = 160
MAX_ANSWER_WORDS = 70
MAX_ANSWER_ZH = 120  # characters
# Rows whose prompt holds one of these are left out: sample generations are printed in a report that people read.
_COARSE = re.compile(
    r"fuck|shit|bitch|cunt|nigg|fag|whore|slut|dick|cock|pussy|porn|rape|sex|incest|pedo|molest|tits|boob|jew|"
    r"race|racis|black|white people|whites|muslim|islam|christian|mexic|asian|immigra|hitler|nazi|arab|indian|"
    r"retard|masturb|penis|vagina|dildo|semen|gay|\bass\b|asshole|orgasm|nude|naked|kill (your|my|him|her)self|suicid",
    re.IGNORECASE,
)
# Answers that say that the text to be treated is missing, or that the writer is a machine.
_NO_ANSWER_ZH = re.compile("没有提供|未提供|抱歉|对不起|不好意思|人工智能助手|作为一个|语言模型|无法")
_LIMITS = {"medquad": (1600, 223), "hh": (500, 100), "taskmaster": (200, 50)}


def main(source: str, output: str) -> None:
    """Write ``dialogues.jsonl.gz``, ``dialogues_zh.jsonl.gz``, and ``attack_prompts.jsonl.gz`` for the attack table.

    Args:
        source: Folder with ``domain_medicine/`` (MedQuAD's file, PubMedQA's two), ``hh_rlhf/`` and ``prompts/``
            (Taskmaster's and Self-Instruct's files) and ``sft/`` (LLaMA-Factory's Chinese sample), named as the
            readers below name them.
        output: The folder to write into.
    """
    folder = Path(source)
    rows: list[dict[str, str]] = []
    for name, reader in (("medquad", read_medquad), ("hh", read_hh), ("taskmaster", read_taskmaster)):
        rows += _select(name, reader(folder))
    seen = {_normalize(row["prompt"]) for row in rows if row["split"] == "train"}
    rows = [row for row in rows if row["split"] == "train" or _normalize(row["prompt"]) not in seen]
    _write(Path(output) / "dialogues.jsonl.gz", rows)
    _write(Path(output) / "dialogues_zh.jsonl.gz", list(read_alpaca_zh(folder)))
    _write(Path(output) / "attack_prompts.jsonl.gz", [*read_pubmedqa_test(folder), *read_instructions(folder)])


def read_medquad(folder: Path) -> Iterator[dict[str, str]]:
    """Yield consumer health questions with the first sentences of their answers, under MedQuAD's split by page."""
    for row in _read(folder / "domain_medicine/medquad_qa.jsonl.gz"):
        prompt = re.sub(r"\s+\?", "?", row["question"].replace("(are)", "").replace("  ", " ")).strip()
        answer = re.sub(r"^Summary\s*:\s*", "", row["answer"])
        yield {"prompt": prompt, "answer": _shorten(answer), "source": "medquad", "split": row["split"]}


def read_hh(folder: Path) -> Iterator[dict[str, str]]:
    """Yield first human turns of HH-RLHF harmless-base (test) with the assistant's first reply in the chosen text."""
    for row in _read(folder / "hh_rlhf/harmless-base-test.jsonl.gz"):
        turns = re.split(r"\n\n(?:Human|Assistant): ", row["chosen"])[1:]
        if len(turns) >= 2:
            prompt = re.sub(r"\s+", " ", turns[0]).strip()
            yield {"prompt": prompt, "answer": _shorten(turns[1]), "source": "hh", "split": _split(prompt)}


def read_taskmaster(folder: Path) -> Iterator[dict[str, str]]:
    """Yield a customer's first order with the assistant's first reply."""
    for row in _read(folder / "prompts/taskmaster4_dialogues.jsonl.gz"):
        turns = [turn["text"].strip() for turn in row["utterances"][:2]]
        if len(turns) == 2:
            yield {"prompt": turns[0], "answer": _shorten(turns[1]), "source": "taskmaster", "split": _split(turns[0])}


def read_alpaca_zh(folder: Path) -> Iterator[dict[str, str]]:
    """Yield Chinese instructions without an input, with the first sentences of their answers."""
    for row in _read(folder / "sft/alpaca_zh_demo.jsonl.gz"):
        prompt, answer = row["instruction"].strip(), ""
        for sentence in re.split(r"(?<=[\u3002\uff01\uff1f])|\n+", row["output"].strip()):
            if answer and len(answer) + len(sentence) > MAX_ANSWER_ZH:
                break
            answer = (
                f"{answer}\n{sentence}" if answer and answer[-1] not in "\u3002\uff01\uff1f" else answer + sentence
            )
        han = len(re.findall(r"[\u4e00-\u9fff]", answer))
        if _NO_ANSWER_ZH.search(answer):
            continue
        if not row["input"] and 5 <= len(prompt) <= 60 and han >= 15 and len(answer) <= 2 * MAX_ANSWER_ZH:
            digest = int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16)
            split = "validation" if digest % 4 == 0 else "train"
            yield {"prompt": prompt, "answer": answer, "source": "alpaca_zh", "split": split}


def read_instructions(folder: Path) -> Iterator[dict[str, str]]:
    """Yield Self-Instruct's user-oriented tasks that a few sentences of prose answer."""
    for row in _read(folder / "prompts/self_instruct_user_oriented_instructions.jsonl.gz"):
        instance = row["instances"][0]
        prompt = re.sub(r"\s+", " ", f"{row['instruction']} {instance['input']}").strip()
        answer = _shorten(instance["output"])
        letters = sum(character.isalpha() or character == " " for character in answer)
        if len(prompt.split()) <= 60 and len(answer.split()) >= 12 and letters >= 0.9 * len(answer):
            yield {"prompt": prompt, "answer": answer, "source": "instructions"}


def read_pubmedqa_test(folder: Path) -> Iterator[dict[str, str]]:
    """Yield PubMedQA's test questions with their conclusions, but for 200 by which the rewards' constants were set."""
    test = json.loads((folder / "domain_medicine/pubmedqa_test_ground_truth.json").read_text())
    with gzip.open(folder / "domain_medicine/pubmedqa_ori_pqal.json.gz", "rt", encoding="utf-8") as file:
        rows = json.load(file)
    for pmid in sorted(test)[200:400]:
        yield {"prompt": rows[pmid]["QUESTION"], "answer": _shorten(rows[pmid]["LONG_ANSWER"]), "source": "pubmedqa"}


def _select(name: str, rows: Iterator[dict[str, str]]) -> list[dict[str, str]]:
    """Keep decent, distinct rows in the order of their hash, at most `_LIMITS` of each split."""
    distinct = {}
    for row in rows:
        is_decent = not _COARSE.search(row["prompt"]) and not (name == "hh" and _COARSE.search(row["answer"]))
        if is_decent and 8 <= len(row["prompt"]) <= MAX_PROMPT_CHARS and len(row["answer"].split()) >= 5:
            distinct.setdefault(_normalize(row["prompt"]), row)
    ordered = sorted(distinct.values(), key=lambda row: hashlib.sha256(row["prompt"].encode()).hexdigest())
    kept = []
    for split, limit in zip(("train", "validation"), _LIMITS[name], strict=True):
        kept += [row for row in ordered if row["split"] == split][:limit]
    return kept


def _read(path: Path) -> Iterator[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    # mtime 0: the same rows give the same bytes
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", compresslevel=9, fileobj=raw, mtime=0) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def _split(text: str) -> str:
    digest = hashlib.sha256(_normalize(text).encode()).hexdigest()
    return "validation" if int(digest[:8], 16) % 5 == 0 else "train"


def _normalize(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def _shorten(text: str) -> str:
    """The first sentences, up to `MAX_ANSWER_WORDS` words; a longer first sentence is cut."""
    text = re.sub(r"\s+", " ", text).strip()
    kept: list[str] = []
    for sentence in re.split(r"(?<=[.!?]) ", text):
        words = sentence.split()
        if kept and len(kept) + len(words) > MAX_ANSWER_WORDS:
            break
        kept += words
    return " ".join(kept[:MAX_ANSWER_WORDS])


if __name__ == "__main__":
    main(*sys.argv[1:])
