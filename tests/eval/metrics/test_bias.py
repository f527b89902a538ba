"""The bias metrics on answers whose scores follow from their definition, and against BBQ's own data."""

import math

import pytest

from deepseek_eval.metrics.loading import load_metric
from deepseek_eval.tasks import bbq, winobias


@pytest.fixture(scope="module")
def questions():
    return list(bbq.build_items(0, None, None))


def score_bbq(items, choose):
    """The metric's figures for somebody who answers by a rule."""
    rows = [{"prediction": choose(item), "target": item.target} for item in items]
    return load_metric("bbq_bias").compute(**bbq.metric_inputs(items, rows))


def other_person(item):
    return next(index for index in range(3) if index not in (item.facts["biased"], item.facts["unknown"]))


def test_one_who_always_follows_the_stereotype_scores_one(questions):
    result = score_bbq(questions, lambda item: item.facts["biased"])
    assert result["bias_score_ambig"] == result["bias_score_disambig"] == 1.0
    assert result["acc_ambig"] == 0.0
    assert result["alignment_gap"] == 1.0
    assert all(part["bias_score_ambig"] == 1.0 for part in result["categories"].values())


def test_one_who_always_goes_against_it_scores_minus_one(questions):
    result = score_bbq(questions, other_person)
    assert result["bias_score_ambig"] == result["bias_score_disambig"] == -1.0
    assert result["alignment_gap"] == -1.0


def test_one_who_never_knows_scores_zero(questions):
    result = score_bbq(questions, lambda item: item.facts["unknown"])
    assert result["bias_score_ambig"] == result["bias_score_disambig"] == 0.0
    assert (result["acc_ambig"], result["acc_disambig"]) == (1.0, 0.0)


def test_one_who_is_always_right_shows_no_bias(questions):
    """Half of the settled contexts agree with the stereotype, but for two templates of Physical_appearance."""
    result = score_bbq(questions, lambda item: item.target)
    assert result["acc"] == 1.0
    assert result["bias_score_ambig"] == 0.0
    scores = {name: part["bias_score_disambig"] for name, part in result["categories"].items()}
    assert scores.pop("Physical_appearance") == pytest.approx((426 - 362) / 788)
    assert scores == {"Age": 0.0, "Religion": 0.0, "Sexual_orientation": 0.0}


def test_scores_by_hand():
    # Ambiguous: biased, biased, other, UNKNOWN. s = 2 * 2/3 - 1 = 1/3, accuracy 1/4, so 3/4 * 1/3.
    # Settled: biased (right), biased (wrong), UNKNOWN (wrong). s = 2 * 2/2 - 1.
    result = load_metric("bbq_bias").compute(
        predictions=[0, 0, 1, 2, 0, 0, 2],
        references=[2, 2, 2, 2, 0, 1, 1],
        contexts=["ambig"] * 4 + ["disambig"] * 3,
        biased_answers=[0] * 7,
        unknown_answers=[2] * 7,
    )
    assert result["bias_score_ambig"] == pytest.approx(0.25)
    assert result["bias_score_disambig"] == 1.0
    # The ambiguous score is the mean of 1, 1, -1, 0.
    assert result["bias_score_ambig_stderr"] == pytest.approx(math.sqrt((3 - 4 * 0.25**2) / 3 / 4))
    assert result["acc_disambig"] == pytest.approx(1 / 3)
    assert (result["acc_ambig_n"], result["acc_disambig_n"], result["bias_score_disambig_n"]) == (4, 3, 2)
    assert result["alignment_gap"] == 1.0


def test_errors_count_templates(questions):
    def choose(item):
        return item.facts["biased"] if int(item.id.rpartition("/")[2]) // 40 % 3 else item.target

    rows = [{"prediction": choose(item), "target": item.target} for item in questions]
    inputs = bbq.metric_inputs(questions, rows)
    clustered = load_metric("bbq_bias").compute(**inputs)
    plain = load_metric("bbq_bias").compute(**{**inputs, "clusters": None})
    assert clustered["bias_score_ambig"] == plain["bias_score_ambig"]
    assert clustered["bias_score_ambig_stderr"] > 2 * plain["bias_score_ambig_stderr"]


def test_biased_answers_depend_on_the_polarity_of_the_question(questions):
    by_id = {item.id: item for item in questions}
    # Age/0: the grandfather is old, hence stereotyped; "not comfortable using the phone" is negative.
    assert by_id["Age/0"].facts["biased"] == 0
    # Age/2, the same context, asks who was giving the other the opportunity: the grandson is the stereotype's answer.
    assert by_id["Age/2"].facts["biased"] == 1
    assert all(item.facts["biased"] in (0, 1, 2) for item in questions)
    assert len(questions) == 7320


def test_the_share_of_stereotypes_by_hand():
    result = load_metric("stereotype_preference").compute(
        predictions=[[-1.0, -2.0], [-3.0, -1.0], [-2.0, -2.0], [-1.0, -5.0]],
        references=["age", "age", "gender", "gender"],
        directions=["stereo", "antistereo", "stereo", "stereo"],
    )
    # A tie prefers nothing.
    assert (result["pct_stereotype"], result["num_ties"]) == (0.5, 1)
    assert result["likelihood_diff"] == pytest.approx((1 + 2 + 0 + 4) / 4)
    assert result["bias_types"]["age"]["pct_stereotype"] == 0.5
    assert result["directions"]["antistereo"] == {
        "pct_stereotype": 0.0,
        "pct_stereotype_stderr": None,
        "n": 1,
    }


def test_the_gap_is_paired():
    """Pro and anti sentences of equal difficulty: the gap is certain although accuracy is not."""
    hits = [1, 1, 0, 0, 1, 0]
    result = load_metric("coreference_gap").compute(
        predictions=[hit for hit in hits for _ in range(2)],
        references=[1] * 12,
        polarities=["pro", "anti"] * 6,
        pairs=[index for index in range(6) for _ in range(2)],
        types=[1] * 6 + [2] * 6,
    )
    assert (result["acc"], result["gap"], result["gap_stderr"]) == (0.5, 0.0, 0.0)
    assert result["acc_pro_stderr"] == pytest.approx(math.sqrt(0.25 / 5))
    assert result["types"]["1"]["acc"] == pytest.approx(2 / 3)
    assert (result["n"], result["gap_n"]) == (12, 6)


def test_one_who_follows_occupations_stereotypes_has_the_whole_gap():
    items = list(winobias.build_items(0, None, None))
    rows = [
        {"prediction": item.target if item.facts["polarity"] == "pro" else 1 - item.target, "target": item.target}
        for item in items
    ]
    result = load_metric("coreference_gap").compute(**winobias.metric_inputs(items, rows))
    assert (result["acc_pro"], result["acc_anti"], result["gap"], result["acc"]) == (1.0, 0.0, 1.0, 0.5)
    assert result["n"] == 3168


@pytest.mark.parametrize(
    ("metric", "inputs", "message"),
    [
        ("bbq_bias", {"predictions": [0], "references": [0]}, "expected contexts"),
        ("coreference_gap", {"predictions": [0], "references": [0]}, "expected polarities and pairs"),
        (
            "coreference_gap",
            {"predictions": [0], "references": [0], "polarities": ["pro"], "pairs": ["a"]},
            "pair 'a' wants one pro and one anti",
        ),
    ],
)
def test_what_is_missing_is_named(metric, inputs, message):
    with pytest.raises(ValueError, match=message):
        load_metric(metric).compute(**inputs)
