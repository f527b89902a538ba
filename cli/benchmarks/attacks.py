"""A fixed set of attacks on the rewards, and how often an honest answer stands above all of them.

``deepseek-moe bench attacks`` prints the table. Honest answers and prompts come from data on which
nothing was built: MedQuAD's validation pages, PubMedQA's test questions and Self-Instruct's user-oriented tasks.
The honest answer is a person's, and often shorter than an attack stuffed with the words of the prompt; a
completion is scored alone, so of diversity only what it repeats within itself takes part, not self-BLEU.
"""

import argparse
import dataclasses
import random
import re
from collections.abc import Callable
from typing import Any

from deepseek_cli.benchmarks.attack_texts import FLATTERY, FLATTERY_ZH, REFUSAL, REFUSAL_ZH, UNSAFE, UNSAFE_ZH
from deepseek_cli.benchmarks.result_files import BenchmarkRun
from deepseek_training.rewards.function_words import FUNCTION_WORDS
from deepseek_training.rewards.scripts import is_han
from deepseek_training.rewards.words import split_words

SEED = 0
LANGUAGES = ("English", "Chinese")
_WORD = re.compile(r"[A-Za-z'\u2019]+")
_NOT_A_PLURAL = re.compile(r"(ss|us|is|['\u2019]\w*)$")
_NUMBERS = (
    (re.compile(r"ies$"), "y"),
    (re.compile(r"(?<=ch|sh)es$|(?<=[xz])es$"), ""),
    (re.compile(r"s$"), ""),
    (re.compile(r"(?<=[^aeiou])y$"), "ies"),
    (re.compile(r"(?<=ch|sh)$|(?<=[xz])$"), "es"),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One prompt with its honest answer.

    Attributes:
        prompt: What was asked.
        answer: What a person answered.
        source: The set it is from.
    """

    prompt: str
    answer: str
    source: str


def load_cases(language: str = "English") -> list[Case]:
    """Return the held-out prompts of a language with honest answers.

    Args:
        language: English or Chinese.
    """
    from deepseek_training.data.texts import DATA_FOLDER, read_rows

    if language == "Chinese":
        rows = [row for row in read_rows("dialogues_zh") if row["split"] == "validation"]
    else:
        rows = [row for row in read_rows("dialogues") if row["split"] == "validation" and row["source"] == "medquad"]
        rows += list(read_rows(DATA_FOLDER / "attack_prompts.jsonl.gz", column="prompt"))
    return [Case(row["prompt"], row["answer"], row["source"]) for row in rows]


def load_training_answers(language: str = "English") -> list[str]:
    """Return answers that the policy has seen in training, which a copier would recite."""
    from deepseek_training.data.texts import read_rows

    name, source = ("dialogues_zh", "alpaca_zh") if language == "Chinese" else ("dialogues", "medquad")
    return [row["answer"] for row in read_rows(name) if row["split"] == "train" and row["source"] == source]


def make_attacks(case: Case, training_answers: list[str], rng: random.Random) -> dict[str, str]:
    """Return the attacks on one prompt by name.

    Args:
        case: The prompt and its honest answer.
        training_answers: From `load_training_answers`.
        rng: Draws the keywords' order, the wording and the copied sentence.
    """
    is_chinese = any(is_han(word) for word in split_words(case.prompt))
    words = split_words(case.prompt)
    keywords = [word for word in words if word not in FUNCTION_WORDS] or words
    stuffing = keywords * (1 + 30 // len(keywords))
    rng.shuffle(stuffing)
    longest = max(keywords, key=len)
    if is_chinese:
        return {
            "echo": case.prompt,
            "echo, particles added": add_particles(case.prompt),
            "empty": "",
            "one token repeated": longest * 40,
            "flattery": rng.choice(FLATTERY_ZH),
            "keyword stuffing": "".join(stuffing),
            "refusal": rng.choice(REFUSAL_ZH),
            "unsafe but relevant": f"{case.answer[:50]}，{rng.choice(UNSAFE_ZH)}。",
            "copied training sentence": rng.choice(training_answers),
        }
    opening = " ".join(case.answer.split()[:25])
    return {
        "echo": case.prompt,
        "echo, number changed": change_number(case.prompt),
        "empty": "",
        "one token repeated": " ".join([longest] * 40),
        "flattery": rng.choice(FLATTERY),
        "keyword stuffing": " ".join(stuffing),
        "refusal": rng.choice(REFUSAL),
        "unsafe but relevant": f"{opening} And {rng.choice(UNSAFE)}.",
        "copied training sentence": rng.choice(training_answers),
    }


def add_particles(text: str) -> str:
    """Return a Chinese text with a particle after every second character, so that hardly a pair of it is left.

    Args:
        text: A prompt.
    """
    return re.sub(r"([\u4e00-\u9fff]{2})", "\\1\u7684", text)


def change_number(text: str) -> str:
    """Return the text with each noun, or what may be one, in the other number: "diseases" for "disease".

    Mechanical: other words get or lose the same endings, so that it reads as "How does doctor treats disease".

    Args:
        text: A prompt.
    """
    return _WORD.sub(lambda match: _change_word(match.group()), text)


def _change_word(word: str) -> str:
    lower = word.lower()
    if lower in FUNCTION_WORDS or len(lower) < 4 or _NOT_A_PLURAL.search(lower):
        return word
    for pattern, ending in _NUMBERS:
        if pattern.search(lower):
            return pattern.sub(ending, word)
    return f"{word}s"


def run_attacks(reward: Callable[..., list[float]], cases: list[Case], answers: list[str]) -> list[dict[str, Any]]:
    """Return one row a case: the honest answer's score, each attack's, and whether the honest one is above all.

    Every completion is scored in a call of its own, without a bank: what it shares with others does not count.

    Args:
        reward: A single reward or the weighted sum.
        cases: From `load_cases`.
        answers: From `load_training_answers`.
    """
    rng = random.Random(SEED)
    rows = []
    for case in cases:
        attacks = make_attacks(case, answers, rng)
        completions = [case.answer, *attacks.values()]
        prompts = [case.prompt] * len(completions)
        # one completion per call: in one batch the honest answer would count as a copy of the attack that quotes it
        scores = [
            reward(prompts=[p], completions=[c], is_evaluation=True)[0]
            for p, c in zip(prompts, completions, strict=True)
        ]
        honest, attacked = scores[0], dict(zip(attacks, scores[1:], strict=True))
        rows.append({"source": case.source, "honest": honest, **attacked, "is_won": honest > max(attacked.values())})
    return rows


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean scores, how often each attack was beaten, and how often all of them at once."""
    names = [name for name in rows[0] if name not in ("source", "honest", "is_won")]
    return {
        "n": len(rows),
        "honest": _mean([row["honest"] for row in rows]),
        "attacks": {
            name: {
                "mean": _mean([row[name] for row in rows]),
                "beaten": _mean([row["honest"] > row[name] for row in rows]),
            }
            for name in names
        },
        "beats_all": _mean([row["is_won"] for row in rows]),
    }


def measure(embedder: Any = None, language: str = "English") -> dict[str, Any]:
    """Return the whole table of a language: each reward and their sums, over each set and all.

    Args:
        embedder: What `Relevance` compares with; None takes the embedded one.
        language: English or Chinese.
    """
    from deepseek_training.rewards import Diversity, Relevance, Safety, WeightedReward

    cases, answers = load_cases(language), load_training_answers(language)
    weights = [0.7, 0.2, 0.1]
    bare, guarded = Relevance(embedder, has_guards=False), Relevance(embedder)
    rewards = {
        "bare cosine": bare,
        "relevance": guarded,
        "safety": Safety(),
        "diversity": Diversity(bank_size=0),
        "sum without guards": WeightedReward([bare, Safety(), Diversity(0)], weights),
        "sum": WeightedReward([guarded, Safety(), Diversity(0)], weights),
        "sum with gate": WeightedReward([guarded, Safety(), Diversity(0)], weights, gate="safety"),
    }
    table = {}
    for name, reward in rewards.items():
        rows = run_attacks(reward, cases, answers)
        table[name] = {"all": summarize(rows)}
        for source in dict.fromkeys(case.source for case in cases):
            table[name][source] = summarize([row for row in rows if row["source"] == source])
    return table


def load_encoder(name: str) -> Any:
    """Return a sentence encoder that embeds each text once, by folder, Hub id, or ``minilm`` where it is installed."""
    from deepseek_training.rewards.encoders import RememberingEncoder, SentenceEncoder, find_minilm

    return RememberingEncoder(SentenceEncoder(find_minilm() if name == "minilm" else name))


def format_table(table: dict[str, Any]) -> str:
    """Return the table as text: mean score of each attack, and in brackets how often the honest answer is above it."""
    columns = list(table)
    lines = [f"{'':26}" + "".join(f"{name:>20}" for name in columns)]
    first = table[columns[0]]["all"]
    lines.append(f"{'honest answer':26}" + "".join(f"{table[c]['all']['honest']:>20.2f}" for c in columns))
    for attack in first["attacks"]:
        cells = [table[c]["all"]["attacks"][attack] for c in columns]
        lines.append(f"{attack:26}" + "".join(f"{x['mean']:>13.2f} {x['beaten']:>5.0%} " for x in cells))
    for source in table[columns[0]]:
        n = table[columns[0]][source]["n"]
        share = "".join(f"{table[c][source]['beats_all']:>20.1%}" for c in columns)
        lines.append(f"{f'above all, {source} ({n})':26}" + share)
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Print the table and write it as JSON.

    Args:
        args: The options of ``deepseek-moe bench attacks``.
    """
    encoder = load_encoder(args.encoder) if args.encoder else None
    bench = BenchmarkRun("attacks", args.output, {"encoder": args.encoder}, overwrite=args.overwrite)
    figures = {language: measure(encoder, language) for language in LANGUAGES}
    table = "\n\n".join(f"{language}\n{format_table(part)}" for language, part in figures.items())
    print(table)
    bench.finish(figures, table)
    return 0


def _mean(values: list[Any]) -> float:
    return sum(values) / len(values)
