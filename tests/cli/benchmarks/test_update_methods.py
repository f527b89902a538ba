"""The table of updates in sequence: its figures by hand, and one short sequence behind the gate."""

import random

import pytest
import torch

from deepseek_cli.benchmarks import update_sequence
from deepseek_cli.benchmarks.update_methods import TEXTS, figures_of, format_gate
from deepseek_cli.benchmarks.update_sequence import METHODS, Updated, UpdateSequence
from deepseek_cli.benchmarks.update_texts import FIRST, LATER, LessonTexts, read_lesson
from deepseek_training.data.tokenizer import train_tokenizer
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM


def rows(*table):
    return [Updated(dict(zip(TEXTS, row, strict=True))) for row in table]


def test_figures_by_hand():
    """Each text falls by 1 when it is taught, rises by 0.1 with each later update, and by 0.2 before its own."""
    before = [3.0] * len(TEXTS)
    table = [before]
    for taught in range(1, len(TEXTS)):
        row = [value + 0.1 for value in table[-1]]
        row[taught] = before[taught] - 1
        for later in range(taught + 1, len(TEXTS)):
            row[later] = table[-1][later] + 0.2
        table.append(row)
    found = figures_of(rows(before)[0], rows(*table[1:]))
    assert found["learned"] == pytest.approx(1.0)
    # Text 0 rises five times, text j 5 - j times.
    assert found["forgotten"] == pytest.approx(0.1 * (5 + 4 + 3 + 2 + 1) / 5)
    # Text j has met j - 1 updates before its own, each a loss of 0.2.
    assert found["forward"] == pytest.approx(-0.2 * (1 + 2 + 3 + 4) / 4)
    assert found["final"] == pytest.approx(sum(table[-1]) / len(TEXTS))
    assert figures_of(rows(before)[0], rows(table[-1])) == {"final": pytest.approx(found["final"])}


def test_the_gate_reads_other_text_than_the_table():
    for name in (FIRST, *LATER):
        lesson = read_lesson(name)
        shown, deciding = set(lesson.held_out), set(lesson.of_gate)
        assert shown and deciding and not shown & deciding, name
        assert not (shown | deciding) & set(lesson.train), name


def tiny_lesson(name, words):
    rng = random.Random(name)
    documents = ["\n".join(" ".join(rng.choices(words, k=12)) for _ in range(6)) for _ in range(120)]
    return LessonTexts(name, documents[:60], documents[60:90], documents[90:])


@pytest.mark.slow
def test_a_sequence_behind_the_gate(monkeypatch):
    """Three made texts, the first of which the model has read; the gate picks, refuses or keeps, and is told."""
    monkeypatch.setattr(update_sequence, "LATER", LATER[:2])
    words = {
        FIRST: "the king and his mill by a river",
        LATER[0]: "take two doses of aspirin",
        LATER[1]: "a b c d e f g",
    }
    texts = [tiny_lesson(name, text.split()) for name, text in words.items()]
    tokenizer = train_tokenizer([text for one in texts for text in one.train], 300)
    torch.manual_seed(0)
    model = DeepseekForCausalLM(DeepseekConfig.from_preset("debug", vocab_size=len(tokenizer)))
    sizes = {"length": 32, "held_out_bytes": 4000, "gate_bytes": 4000}
    sequence = UpdateSequence.prepare(model, tokenizer, texts, **sizes)
    before, taught = sequence.measure(model), {FIRST}
    for name, one in zip(LATER, sequence.run(METHODS["replay + gate"], steps=6, seed=0, batch_size=4), strict=False):
        asked = {finding["dataset"] for finding in one.gate["findings"] if finding["kind"] == "loss"}
        assert asked == taught and one.gate["alpha"] in (0.25, 0.5, 0.75, 1.0)
        if one.gate["accepted"]:
            taught.add(name)
            assert one.bits != before and any(one.drift.values())
        else:  # the old model stays, to the last bit, and its routers too
            assert one.gate["why"] and one.bits == pytest.approx(before, abs=1e-9)
            assert all(value == pytest.approx(0.0, abs=1e-12) for value in one.drift.values())
        before = one.bits
    naive = sequence.run(METHODS["naive"], steps=2, seed=0, batch_size=4)
    assert len(naive) == 2 and not any(one.gate for one in naive)


def test_what_the_gate_said_is_told():
    kept = Updated({}, {}, {"accepted": True, "alpha": 0.5, "why": [], "findings": []})
    refused = Updated({}, {}, {"accepted": False, "alpha": 1.0, "why": ["books: lost"], "findings": []})
    name = next(name for name, method in METHODS.items() if method.is_gated)
    table = format_gate({"0": {name: [kept] * 5}, "1": {name: [refused] * 5}}, [name])
    assert "| books | 0.5, refused | books: lost |" in table
    assert format_gate({}, ["naive"]) == ""
