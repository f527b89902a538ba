"""The losses against torch.distributions and TRL in fp64, the bucket against the whole, and sums over passes."""

import itertools

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from trl.experimental.gkd import GKDTrainer

from deepseek_training.compress import distill_loss as module
from deepseek_training.compress.distill_loss import Divergence, TopK, distill_loss, divergence_sum, shorten

NAMES = ("forward_kl", "reverse_kl", "jsd")
TRL_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.3}


def logits_of(*shape, seed, scale=2.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def reference(student, teacher, divergence):
    """By torch.distributions, from probabilities."""
    p, q = (Categorical(logits=values / divergence.temperature) for values in (teacher, student))
    if divergence.name == "forward_kl":
        value = kl_divergence(p, q)
    elif divergence.name == "reverse_kl":
        value = kl_divergence(q, p)
    else:
        m = Categorical(probs=(1 - divergence.beta) * q.probs + divergence.beta * p.probs)
        value = divergence.beta * kl_divergence(p, m) + (1 - divergence.beta) * kl_divergence(q, m)
    return value.sum() * divergence.temperature**2


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def gradient(student, teacher, divergence):
    student = student.clone().requires_grad_()
    divergence_sum(student, teacher, divergence).backward()
    return student.grad


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_each_divergence_is_that_of_torch_distributions_and_of_trl(name, temperature):
    divergence = Divergence(name, 0.3, temperature)
    student, teacher = logits_of(7, 11, seed=0).requires_grad_(), logits_of(7, 11, seed=1)
    found, expected = divergence_sum(student, teacher, divergence), reference(student, teacher, divergence)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    theirs = GKDTrainer.generalized_jsd_loss(
        student, teacher, beta=TRL_BETA[name], temperature=temperature, reduction="sum"
    )
    torch.testing.assert_close(found, theirs * temperature**2, rtol=1e-6, atol=0)  # TRL's beta is of fp32 precision
    (ours,) = torch.autograd.grad(found, student, retain_graph=True)
    (slow,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(ours, slow, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("top_k", [None, 3, 9])
def test_gradients_by_differences(name, top_k):
    divergence = Divergence(name, 0.3, 1.7)
    teacher = logits_of(4, 9, seed=1)
    known = teacher if top_k is None else shorten(teacher, top_k, 1.7)
    student = logits_of(4, 9, seed=0).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: divergence_sum(values, known, divergence), (student,))


@pytest.mark.parametrize("name", NAMES)
def test_a_bucket_with_every_token_is_the_whole_distribution(name):
    divergence = Divergence(name, 0.3, 2.0)
    student, teacher = logits_of(7, 11, seed=0), logits_of(7, 11, seed=1)
    whole = divergence_sum(student, teacher, divergence)
    torch.testing.assert_close(divergence_sum(student, shorten(teacher, 11, 2.0), divergence), whole)
    almost = divergence_sum(student, shorten(teacher, 10, 2.0), divergence)  # the eleventh alone is the rest
    torch.testing.assert_close(almost, whole)


def test_the_bucket_is_compared_over_k_plus_one_events():
    """The definition, from probabilities: and never more than the whole divergence."""
    student, teacher = logits_of(7, 40, seed=0), logits_of(7, 40, seed=1)
    p, q = teacher.softmax(-1), student.softmax(-1)
    ids = p.topk(5).indices
    pk, qk = p.gather(1, ids), q.gather(1, ids)
    pk, qk = (torch.cat([one, 1 - one.sum(1, keepdim=True)], 1) for one in (pk, qk))
    found = divergence_sum(student, shorten(teacher, 5, 1.0), Divergence())
    torch.testing.assert_close(found, (pk * (pk / qk).log()).sum(), rtol=1e-10, atol=0)
    assert found < divergence_sum(student, teacher, Divergence())


def test_a_bucket_points_where_the_teacher_does_and_a_renormalized_one_does_not():
    """Of a student that is near its teacher already; `test_distill_training.py` has the figures of a trained pair."""
    teacher, student = logits_of(200, 1024, seed=1), logits_of(200, 1024, seed=0)
    student = teacher + 0.5 * student
    full = gradient(student, teacher, Divergence())
    known = shorten(teacher, 32, 1.0)
    bucket = gradient(student, known, Divergence())
    renormalized = torch.full_like(teacher, float("-inf")).scatter(1, known.ids, known.log_probs[:, :-1])
    wrong = gradient(student, renormalized.masked_fill(renormalized.isinf(), -1e9), Divergence())
    assert relative(bucket, full) < 0.5 * relative(wrong, full)


def test_masks_and_the_shift_are_those_of_the_cross_entropy():
    student, teacher = logits_of(2, 6, 11, seed=0), logits_of(2, 6, 11, seed=1)
    labels = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(2))
    labels[0, 3] = labels[1, 0] = labels[1, 5] = -100  # the first is no target anyway
    settings = {"divergence": Divergence(temperature=2.0), "weight": 0.25}
    found = distill_loss(student, teacher, labels, **settings)
    places = [(b, s) for b, s in itertools.product(range(2), range(5)) if labels[b, s + 1] != -100]
    assert len(places) == 8
    loss = 0.0
    for b, s in places:
        loss -= 0.75 * student[b, s].log_softmax(-1)[labels[b, s + 1]]
        loss += 0.25 * reference(student[b, s], teacher[b, s], Divergence(temperature=2.0))
    torch.testing.assert_close(found, loss / 8)
    known = shorten(teacher[:, :-1], 11, 2.0)
    torch.testing.assert_close(distill_loss(student, known, labels, **settings), found)


@pytest.mark.parametrize("num_passes", [1, 2, 4])
def test_passes_add_up_to_one(num_passes):
    student, teacher = logits_of(4, 6, 11, seed=0).requires_grad_(), logits_of(4, 6, 11, seed=1)
    labels = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(2))
    labels[0, 1:] = -100  # passes of unequal numbers of targets
    settings = {"divergence": Divergence(), "weight": 0.5}
    (whole,) = torch.autograd.grad(distill_loss(student, teacher, labels, **settings), student)
    num_items = int((labels[:, 1:] != -100).sum())
    parts = zip(student.chunk(num_passes), teacher.chunk(num_passes), labels.chunk(num_passes), strict=True)
    loss = sum(distill_loss(*part, **settings, num_items=num_items) for part in parts)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], whole, rtol=1e-12, atol=1e-15)


def test_a_batch_compared_in_pieces_is_the_same(monkeypatch):
    student, teacher = logits_of(10, 11, seed=0), logits_of(10, 11, seed=1)
    for known in (teacher, shorten(teacher, 4, 1.0)):
        monkeypatch.setattr(module, "_MOST_ELEMENTS", 2**24)
        whole = divergence_sum(student, known, Divergence()), gradient(student, known, Divergence())
        monkeypatch.setattr(module, "_MOST_ELEMENTS", 33)
        pieces = divergence_sum(student, known, Divergence()), gradient(student, known, Divergence())
        torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-14)


def test_extreme_teachers_give_finite_losses():
    """A certain teacher leaves the rest a probability that fp32 cannot tell from 0."""
    teacher = torch.tensor([[200.0, 0.0, -200.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    student = torch.tensor([[-200.0, 0.0, 200.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    for name, known in itertools.product(NAMES, (teacher, shorten(teacher, 2, 1.0), shorten(teacher, 4, 1.0))):
        assert torch.isfinite(gradient(student, known, Divergence(name))).all()
    known = TopK(shorten(teacher, 2, 1.0).log_probs.to(torch.float16), shorten(teacher, 2, 1.0).ids)
    assert torch.isfinite(gradient(student, known, Divergence())).all()
