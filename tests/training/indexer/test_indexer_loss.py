"""The loss against loops that follow the paper, in fp64, and against its gradient worked out by hand."""

import math

import pytest
import torch

from deepseek_training.indexer import indexer_loss
from deepseek_training.indexer.indexer_loss import attention_on_candidates, indexer_kl

# B, S, K; odd, and more queries than candidates.
SHAPE = (2, 7, 5)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def valid_candidates():
    """Query 0 sees none, query 1 one, and so on, as under a causal mask; the last of the second row is padding."""
    seen = torch.arange(SHAPE[2]) < torch.arange(SHAPE[1]).unsqueeze(1)
    seen = seen.expand(SHAPE).clone()
    seen[1, -1] = False
    return seen


def plain_kl(scores, attention, is_valid):
    values = torch.zeros(SHAPE[:2], dtype=torch.float64)
    for b in range(SHAPE[0]):
        for t in range(SHAPE[1]):
            chosen = [s for s in range(SHAPE[2]) if is_valid[b, t, s]]
            total = sum(math.exp(scores[b, t, s]) for s in chosen)
            mass = sum(float(attention[b, t, s]) for s in chosen)
            for s in chosen:
                p = float(attention[b, t, s]) / mass
                values[b, t] += p * (math.log(p) - math.log(math.exp(scores[b, t, s]) / total))
    return values


def test_the_divergence_of_each_query():
    scores, attention, is_valid = random(*SHAPE), random(*SHAPE, seed=1).exp(), valid_candidates()
    found, has_any = indexer_kl(scores, attention, is_valid)
    torch.testing.assert_close(found, plain_kl(scores, attention, is_valid), rtol=1e-12, atol=1e-13)
    assert torch.equal(has_any, is_valid.any(-1)) and found[has_any].max() > 0.1


def test_the_gradient_is_the_difference_of_the_distributions():
    scores, attention, is_valid = random(*SHAPE).requires_grad_(), random(*SHAPE, seed=1).exp(), valid_candidates()
    attention.requires_grad_()
    indexer_kl(scores, attention, is_valid)[0].sum().backward()
    expected = torch.zeros(SHAPE, dtype=torch.float64)
    for b, t in is_valid.any(-1).nonzero().tolist():
        chosen = is_valid[b, t]
        p = attention[b, t, chosen] / attention[b, t, chosen].sum()
        expected[b, t, chosen] = (scores[b, t, chosen].softmax(-1) - p).detach()
    torch.testing.assert_close(scores.grad, expected, rtol=1e-12, atol=1e-14)
    assert attention.grad is None


def test_equal_distributions_diverge_by_nothing():
    scores, is_valid = random(*SHAPE), valid_candidates()
    assert indexer_kl(scores, 3 * scores.exp(), is_valid)[0].abs().max() < 1e-14


@pytest.mark.parametrize("is_bool", [True, False])
@pytest.mark.parametrize("has_sinks", [True, False])
@pytest.mark.parametrize("at_once", [2**26, 1, 4 * 6 * 2 * 3])
def test_attention_on_candidates(monkeypatch, is_bool, has_sinks, at_once):
    """B=2, N=4 heads over 2 of the keys, S=T=6; three candidates of two keys, some of them absent."""
    monkeypatch.setattr(indexer_loss, "ENTRIES_AT_ONCE", at_once)
    query, key = random(2, 4, 6, 3), random(2, 2, 6, 3, seed=1)
    seen = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6)
    mask = seen if is_bool else torch.zeros(2, 1, 6, 6, dtype=torch.float64).masked_fill(~seen, -1e300)
    sinks = random(4, seed=2) if has_sinks else None
    places = torch.randint(-1, 6, (2, 6, 3, 2), generator=torch.Generator().manual_seed(3))
    found = attention_on_candidates(query, key, mask, 0.7, places, sinks)
    expected = torch.zeros(2, 6, 3, dtype=torch.float64)
    for b in range(2):
        for n in range(4):
            for t in range(6):
                weights = [math.exp(0.7 * float(query[b, n, t] @ key[b, n // 2, s])) for s in range(t + 1)]
                total = sum(weights) + (math.exp(sinks[n]) if has_sinks else 0)
                for k in range(3):
                    expected[b, t, k] += sum(weights[s] / total for s in places[b, t, k].tolist() if 0 <= s <= t)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
