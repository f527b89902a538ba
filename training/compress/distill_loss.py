"""How far a student is from its teacher, token by token: forward KL, reverse KL or a generalized JSD.

The trainer of `distill` calls `distill_loss`. With p the teacher's and q the student's distribution of a token at a
temperature, and m = (1 - b) q + b p::

    forward_kl  KL(p || q)        reverse_kl  KL(q || p)        jsd  b KL(p || m) + (1 - b) KL(q || m)

A cached teacher gives its k likeliest tokens and the probability of all others together. Both distributions are then
compared over these k + 1 events. Leaving the rest out, or making the k sum to 1, would pull the student away from the
teacher: with k = 8 that is worse than no distillation.

Axes: N tokens, V vocabulary, K cached tokens.
"""

import dataclasses
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

DivergenceName = Literal["forward_kl", "reverse_kl", "jsd"]
# Logits of either model that are compared at once; a longer batch is compared piece by piece and recomputed in the
# backward pass, for a few copies in fp32 of 129,280 logits per token would not fit.
_MOST_ELEMENTS = 2**24


class TopK(NamedTuple):
    """A teacher's distributions, shortened.

    Attributes:
        log_probs: `[..., K + 1]`; the last is that of every token which is not among the K, together.
        ids: `[..., K]` int64.
    """

    log_probs: torch.Tensor
    ids: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Divergence:
    """How student and teacher are compared.

    Attributes:
        name: Which divergence.
        beta: The mixture's share of the teacher, for ``jsd``.
        temperature: Divides the logits of both; the divergence is multiplied by its square, so that its gradient keeps
            its size.
    """

    name: DivergenceName = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0


def distill_loss(
    student_logits: torch.Tensor,
    teacher: torch.Tensor | TopK,
    labels: torch.Tensor,
    *,
    divergence: Divergence,
    weight: float,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Return `(1 - weight) * cross-entropy + weight * divergence`, summed over targets and divided by `num_items`.

    A sum over a fixed number, not a mean, so that passes of one optimizer step add up to what one large pass gives.

    Args:
        student_logits: `[B, S, V]`.
        teacher: Logits `[B, S, V]`, or `TopK` of `[B, S - 1, ...]`, of the positions that predict something.
        labels: `[B, S]`; position s predicts `labels[:, s + 1]`, and -100 is not a target.
        divergence: How they are compared.
        weight: Of the divergence against the cross-entropy, in [0, 1].
        num_items: Targets of the whole optimizer step; None: those here.
    """
    targets = labels[:, 1:]
    is_target = targets != -100
    logits = student_logits[:, :-1][is_target]
    loss = logits.new_zeros((), dtype=_precise(logits).dtype)
    if weight < 1:
        loss = loss + (1 - weight) * F.cross_entropy(_precise(logits), targets[is_target], reduction="sum")
    if weight > 0:
        if isinstance(teacher, TopK):
            known: torch.Tensor | TopK = TopK(teacher.log_probs[is_target], teacher.ids[is_target])
        else:
            known = teacher[:, :-1][is_target]
        loss = loss + weight * divergence_sum(logits, known, divergence)
    return loss / (is_target.sum().clamp(min=1) if num_items is None else num_items)


def divergence_sum(student_logits: torch.Tensor, teacher: torch.Tensor | TopK, divergence: Divergence) -> torch.Tensor:
    """Return the divergence summed over tokens, times the temperature's square.

    Args:
        student_logits: `[N, V]`.
        teacher: Logits `[N, V]`, or `TopK` at the same temperature.
        divergence: How they are compared.
    """
    num_rows = max(1, _MOST_ELEMENTS // student_logits.shape[-1])
    if len(student_logits) <= num_rows:
        return _compare(student_logits, teacher, divergence)
    total = student_logits.new_zeros((), dtype=_precise(student_logits).dtype)
    for start in range(0, len(student_logits), num_rows):
        rows = slice(start, start + num_rows)
        part = TopK(teacher.log_probs[rows], teacher.ids[rows]) if isinstance(teacher, TopK) else teacher[rows]
        total = total + checkpoint(_compare, student_logits[rows], part, divergence, use_reentrant=False)
    return total


def shorten(teacher_logits: torch.Tensor, top_k: int, temperature: float) -> TopK:
    """Return a teacher's `top_k` likeliest tokens and the rest as one, in fp32.

    Args:
        teacher_logits: `[..., V]`.
        top_k: K, at most V.
        temperature: Divides the logits first; the rest cannot be had for another one later.
    """
    scaled = _precise(teacher_logits) / temperature
    values, ids = scaled.topk(top_k, dim=-1)
    total = scaled.logsumexp(-1, keepdim=True)
    return TopK(torch.cat([values, _rest(scaled, ids)], -1) - total, ids)


def _compare(student_logits: torch.Tensor, teacher: torch.Tensor | TopK, divergence: Divergence) -> torch.Tensor:
    scaled = _precise(student_logits) / divergence.temperature
    if isinstance(teacher, TopK):
        log_p, log_q = _over_events(scaled, teacher)
    else:
        log_p, log_q = (_precise(teacher) / divergence.temperature).log_softmax(-1), scaled.log_softmax(-1)
    if divergence.name == "forward_kl":
        value = _kl(log_p, log_q)
    elif divergence.name == "reverse_kl":
        value = _kl(log_q, log_p)
    else:
        share = log_p.new_tensor(divergence.beta)
        log_m = torch.logaddexp(log_q + torch.log1p(-share), log_p + share.log())
        value = share * _kl(log_p, log_m) + (1 - share) * _kl(log_q, log_m)
    return value * divergence.temperature**2


def _over_events(scaled: torch.Tensor, teacher: TopK) -> tuple[torch.Tensor, torch.Tensor]:
    """Both log-distributions `[N, K + 1]` over the teacher's tokens and the rest; without a rest where K is V."""
    log_p = _precise(teacher.log_probs)
    log_q = scaled.gather(-1, teacher.ids)
    if teacher.ids.shape[-1] < scaled.shape[-1]:
        log_q = torch.cat([log_q, _rest(scaled, teacher.ids)], -1)
    else:
        log_p = log_p[..., :-1]
    # Sums to 1 but for the rounding of what was stored, which is taken out; K without the rest never sum to 1.
    return log_p.log_softmax(-1), log_q - scaled.logsumexp(-1, keepdim=True)


def _rest(scaled: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log of the summed exponentials of all tokens but `ids`, `[..., 1]`; not 1 minus the others, which cancels."""
    rest = scaled.scatter(-1, ids, float("-inf"))
    if ids.shape[-1] == scaled.shape[-1]:
        return rest.amax(-1, keepdim=True)
    return rest.logsumexp(-1, keepdim=True)


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def _precise(values: torch.Tensor) -> torch.Tensor:
    """In fp32, or fp64 where they are."""
    return values if values.dtype == torch.float64 else values.float()
