"""The drift check on made-up traffic: its figures against scipy, false alarms, power, and what the daily job says."""

import numpy as np
import pytest
from scipy.stats import entropy

from deepseek_serving.monitoring.drift import DriftCheck, holm, kl_nats, p_value
from deepseek_serving.monitoring.drift_job import format_report, measure_drift
from deepseek_serving.monitoring.request_counts import RequestTable, bin_of, load_requests

DAY = 86400


def make_traffic(number, shift=0.0, seed=0, model_hash="a" * 64, ended_at=0.0):
    """Requests of 60 tokens whose tokens and experts belong together: each has a topic of its own."""
    rng = np.random.default_rng(seed)
    base = np.linspace(1, 2, 8)
    moved = base[::-1] ** 3
    center = (1 - shift) * base / base.sum() + shift * moved / moved.sum()
    topics = rng.dirichlet(30 * center, size=number)
    experts = np.array(
        [np.concatenate([rng.multinomial(120, topic), rng.multinomial(120, topic)]) for topic in topics]
    )
    ids = np.array([rng.choice(200, 60, p=np.repeat(topic, 25) / 25) for topic in topics])
    distinct, counts = np.unique(ids, return_counts=True)
    written = rng.integers(1, 33, number)
    return RequestTable(
        model_hash=model_hash,
        layers=["layer.1", "layer.2"],
        sizes=[8, 8],
        ended_at=np.full(number, ended_at),
        prompt_tokens=rng.integers(5, 100, number),
        written_tokens=written,
        is_cut=written == 32,
        log_prob=rng.normal(-2, 0.5, number),
        token_bins=np.array([np.bincount(bin_of(row), minlength=1024) for row in ids]),
        expert_tokens=experts,
        token_ids=distinct,
        token_counts=counts,
    )


@pytest.fixture(scope="module")
def reference():
    return make_traffic(2000, seed=1)


def test_kl_is_scipys():
    rng = np.random.default_rng(0)
    window, before = rng.integers(0, 50, 64), rng.integers(0, 5000, 64)
    assert kl_nats(window, before) == pytest.approx(entropy(window + 0.5, before + 0.5), abs=1e-12)


def test_holm_and_the_tail_go_on_from_the_draws():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    null = np.sort(np.random.default_rng(0).chisquare(5, 1000))
    assert p_value(float(np.median(null)), null) == pytest.approx(0.5, abs=0.01)
    assert p_value(27.86, null) == pytest.approx(3.9e-5, rel=1)  # chi-square's own tail
    assert p_value(1e6, null) == 0


def test_false_alarms_are_as_rare_as_promised(reference):
    check = DriftCheck(reference, 100)
    held, rng = make_traffic(2000, seed=2), np.random.default_rng(3)
    findings = [check.check(held.take(rng.choice(2000, 100, replace=False))) for _ in range(300)]
    # 0.1 % of 300 windows; three or more have a chance of 0.4 %.
    assert sum(any(found.is_significant for found in row) for row in findings) <= 2
    assert not any(found.is_alarm for row in findings for found in row)
    p = np.array([[found.p for found in row] for row in findings])
    assert 0.02 < (p < 0.1).mean() < 0.15  # calibrated, and not merely never small


def test_a_shift_is_seen_where_it_is_and_named(reference):
    check = DriftCheck(reference, 100)
    shifted = make_traffic(100, shift=0.3, seed=4)
    found = {(one.distribution, one.layer): one for one in check.check(shifted)}
    assert found["experts", "layer.1"].is_significant and found["tokens", ""].is_significant
    assert not found["log_prob", ""].is_significant and not found["prompt_length", ""].is_significant
    place, before, now = found["experts", "layer.1"].moved[0]
    assert place in (0, 7) and (now > before) == (place == 0)
    # Few requests: tokens vary so much by chance that the check says nothing about an alarm.
    few = {one.distribution: one for one in DriftCheck(reference, 20).check(shifted.take(np.arange(20)))}
    assert few["tokens"].corrected is None and not few["tokens"].is_alarm


def test_two_days_make_a_warning_and_an_alarm_names_what_moved(reference, tmp_path):
    reference.save(tmp_path / "reference.npz")
    noon = 1_000 * DAY + DAY / 2

    def check(day):
        return measure_drift(
            tmp_path, tmp_path / "reference.npz", hours=24, until=noon + day * DAY, decode=lambda number: f"<{number}>"
        )

    for day, (number, shift) in enumerate([(300, 0.0), (300, 0.3), (300, 0.3), (10, 0.0), (300, 1.0)]):
        traffic = make_traffic(number, shift, seed=10 + day, ended_at=noon + day * DAY - 3600)
        traffic.save(tmp_path / f"requests-{day}.npz")
    quiet, first, second, little, far = (check(day) for day in range(5))
    assert not any(row["is_significant"] or row["is_alarm"] for row in quiet["rows"])
    assert any(row["is_significant"] for row in first["rows"])
    assert not any(row["is_warning"] for row in first["rows"])
    assert {row["distribution"] for row in second["rows"] if row["is_warning"]} == {"experts", "tokens"}
    assert little["rows"] == [] and "too little traffic" in format_report(little)
    assert not any(row["is_warning"] for row in far["rows"])  # the day before said nothing
    experts = next(row for row in far["rows"] if row["distribution"] == "experts")
    assert experts["is_alarm"] and experts["corrected"] > 0.15
    text = format_report(far)
    assert "ALARM" in text and "moved most: '<" in text


def test_counts_come_back_from_files_and_other_models_are_refused(reference, tmp_path):
    make_traffic(30, ended_at=100.0).save(tmp_path / "requests-1.npz")
    make_traffic(40, ended_at=200.0, seed=5).save(tmp_path / "requests-2.npz")
    table = load_requests(tmp_path, 0, 1000)
    assert len(table) == 70 and table.token_counts.sum() == 70 * 60
    assert len(load_requests(tmp_path, 150, 1000)) == 40 and load_requests(tmp_path, 300, 1000) is None
    make_traffic(5, model_hash="b" * 64, ended_at=300.0).save(tmp_path / "requests-3.npz")
    with pytest.raises(ValueError, match="several models"):
        load_requests(tmp_path, 0, 1000)
    reference.save(tmp_path / "reference.npz")
    with pytest.raises(ValueError, match=r"reference: .* is of another model"):
        measure_drift(tmp_path, tmp_path / "reference.npz", hours=0.02, until=300.5)
    with pytest.raises(FileNotFoundError, match="deepseek-moe monitor reference"):
        measure_drift(tmp_path, tmp_path / "other.npz", hours=0.02, until=300.5)
    (tmp_path / "reference.npz").write_text("no")
    with pytest.raises(ValueError, match="expected a file of deepseek-moe's request counts"):
        measure_drift(tmp_path, tmp_path / "reference.npz", hours=0.02, until=300.5)
