"""The long tail of held-out text: what is counted, against a plain count; the figures; the stage's report."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepseek_cli.adapt import tail_lines
from deepseek_records.run_folder import RunFolder
from deepseek_training.data.texts import load_texts
from deepseek_training.knowledge.balance import BANDS
from deepseek_training.knowledge.frequency_loss import TailCounts, TailText, find_words, measure_tail
from deepseek_training.knowledge.tail_figures import describe_tail, mean_counts, ratio_change
from deepseek_training.recipes.loading import build_recipe
from deepseek_training.stages.adapt import AdaptRecipe, adapt


def test_words_and_topics_stand_in_the_band_of_their_documents():
    page = "What causes Gout ?\nUric acid, in crystals."
    train = [page, *(f"Crystals number {i} glitter." for i in range(4)), *("Fever again." for _ in range(8))]
    tail = TailText.prepare(train, ["Crystals of gout cause fevers, says nobody. 痛"])
    held = "Crystals of gout cause fevers, says nobody. 痛"
    bands = {held[s.begin : s.end]: list(BANDS)[s.band] for s in tail.spans["words"][0]}
    # "crystals" is in 5 of 13 documents, above a third: it says nothing of a subject. "again" is not here.
    assert bands == {
        "gout": "1-2",
        "cause": "unseen",
        "fevers": "unseen",
        "says": "unseen",
        "nobody": "unseen",
        "痛": "unseen",
    }
    assert [held[s.begin : s.end] for s in tail.spans["entities"][0]] == ["gout"]
    assert [name for name, _, _ in find_words("Uric acid 123 ab 尿酸")] == ["uric", "acid", "尿", "酸"]


@pytest.fixture(scope="module")
def loaded(policy_path):
    return AutoModelForCausalLM.from_pretrained(policy_path).eval(), AutoTokenizer.from_pretrained(policy_path)


def test_counts_are_those_of_a_plain_pass(loaded):
    model, tokenizer = loaded
    texts = [text[:400] for text in load_texts("medicine", "validation")[:3]]
    tail = TailText.prepare(load_texts("medicine")[:50], texts)
    counts = measure_tail(model, tokenizer, tail, sequence_length=2048)["words"]
    for number, text in enumerate(texts):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor([[tokenizer.bos_token_id, *encoded["input_ids"]]])
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0].log_softmax(-1)
        wanted = np.zeros(len(BANDS))
        for place, (begin, end) in enumerate(encoded["offset_mapping"]):
            for span in tail.spans["words"][number]:
                if begin < span.end and end > span.begin:
                    wanted[span.band] -= float(logs[place, ids[0, place + 1]]) / np.log(2)
        np.testing.assert_allclose(counts.bits[number], wanted, rtol=1e-4)
    num_bytes = sum(
        len(text[s.begin : s.end].encode()) for text, row in zip(texts, tail.spans["words"], strict=True) for s in row
    )
    assert counts.num_bytes.sum() == num_bytes
    short = measure_tail(model, tokenizer, tail, sequence_length=16)["words"]
    assert np.array_equal(short.num_tokens, counts.num_tokens) and short.bits.sum() != counts.bits.sum()


def test_errors_are_those_of_drawing_documents_anew():
    rng = np.random.default_rng(0)
    below = rng.uniform(50, 150, 400)
    one, other = below * rng.normal(2.0, 0.3, 400), below * rng.normal(3.0, 0.5, 400)
    for is_relative in (False, True):
        value, error = ratio_change((one, below), (other, below), is_relative=is_relative)
        drawn = []
        for _ in range(2000):
            rows = rng.integers(0, 400, 400)
            first, second = one[rows].sum() / below[rows].sum(), other[rows].sum() / below[rows].sum()
            drawn.append(second / first - 1 if is_relative else second - first)
        assert value == pytest.approx(np.mean(drawn), abs=3 * error / 40) and error == pytest.approx(
            np.std(drawn), rel=0.1
        )


def test_head_and_tail_are_bands_with_enough_tokens():
    tokens = np.array([[5.0, 60, 0, 0, 300], [10, 60, 0, 0, 100]])
    counts = TailCounts(tokens * [4, 3, 1, 1, 2], tokens * 2, tokens * [0, 0.1, 1, 1, 0.5], tokens)
    found = describe_tail({"words": counts})["words"]
    assert (found["head"], found["tail"]) == ("over 50", "1-2") and list(found["bands"]) == [
        "unseen",
        "1-2",
        "over 50",
    ]
    assert found["gap"][0] == pytest.approx(0.5) and found["drop"][0] == pytest.approx(-0.8)
    same = mean_counts([{"words": counts}, {"words": counts}])["words"]
    assert np.array_equal(same.bits, counts.bits)


def test_the_stage_reports_it(policy_path, tmp_path):
    for name, split in (("books", "validation"), ("medicine", "train")):
        pages = [text for text in load_texts(name, split) if name == "books" or " ?\n" in text[:100]]
        rows = [{"text": text[:3000]} for text in pages[:60]]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        **{"model": str(policy_path), "data": str(tmp_path / "medicine.jsonl"), "report_to": []},
        **{"general_data": str(tmp_path / "books.jsonl"), "replay_share": 0.0, "max_steps": 8, "batch_size": 4},
        **{"sequence_length": 64, "learning_rate": 5e-3, "eval_bytes": 12000, "long_tail": True},
    }
    summary = adapt(build_recipe(settings, AdaptRecipe), tmp_path / "run")
    tail = summary.details["long_tail"]
    before, after = tail["before"]["words"], tail["after"]["words"]
    assert before["bands"].keys() == after["bands"].keys() == tail["change"]["words"].keys()
    for band, (change, error) in tail["change"]["words"].items():
        assert change == pytest.approx(
            after["bands"][band]["bits_per_byte"][0] - before["bands"][band]["bits_per_byte"][0]
        )
        assert error is None or error > 0
    assert tail["change"]["words"][before["head"]][0] < 0 and "entities" in tail["after"]
    assert (tmp_path / "run" / "plots" / "long_tail.png").stat().st_size > 10_000
    assert RunFolder(tmp_path / "run").summary.details["long_tail"] == json.loads(json.dumps(tail))
    assert len(tail_lines(tail)) == len(
        [one for one in tail["after"].values() if "gap" in one and one["drop"][0] is not None]
    )
