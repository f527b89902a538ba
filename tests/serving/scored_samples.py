"""The samples of a served model's evaluation against those of its checkpoint."""

import json

import pytest


def read_rows(folder, task):
    return [json.loads(line) for line in (folder / f"samples_{task}.jsonl").read_text().splitlines()]


def assert_scored_alike(local, over_url):
    """The same predictions and texts, and log-likelihoods equal up to rounding."""
    assert len(local) == len(over_url) > 0
    for mine, theirs in zip(local, over_url, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"duration_s", "seconds"}:
            is_close = name in ("loglikelihoods", "loglikelihood", "bits_per_byte")
            assert theirs[name] == (pytest.approx(mine[name], abs=2e-3) if is_close else mine[name]), name
