"""Whole models in fp64 against the paper's formulas, written out here: both stages, loss and every gradient.

The reference shares nothing with our code: the scores of V3.2, GLM-5-next and V4 are computed here from the indexer's
weights (V4's from its scorer's output), the attention is what the eager model returns.
"""

import pytest
import torch
import torch.nn.functional as F
from indexer_models import build, indexer_parameters, layers_of
from tiny_families import loss_of, token_ids
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from deepseek_training.indexer import IndexerTrainingCallback

IDS = token_ids(2, 24)
LENGTH = 24


class InDouble(TorchFunctionMode):
    """transformers' models go to fp32 for scores and softmax; here they go to fp64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda v: torch.float64 if v is torch.float32 else v, (args, kwargs or {}))
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)


def heads_of(indexer, query_input, hidden, num_heads):
    return query_input.unflatten(-1, (num_heads, -1)), indexer.weights_proj(hidden) * num_heads**-0.5


def weighted(query, key, weights):
    """I_ts = sum_h w_th relu(q_th . k_s / sqrt(D)), one head after another."""
    scores = 0
    for head in range(query.shape[2]):
        scores = scores + weights[..., head, None] * F.relu(query[:, :, head] @ key.mT * query.shape[-1] ** -0.5)
    return scores


def half_split_rope(x, cos, sin, size):
    """The first `size` channels as complex numbers of two halves."""
    half = size // 2
    turned = torch.complex(x[..., :half], x[..., half:size]) * torch.complex(cos[..., :half], sin[..., :half])
    return torch.cat([turned.real, turned.imag, x[..., size:]], -1)


def v32_scores(indexer, call):
    hidden, latent, (cos, sin) = call["args"][:3]
    query, weights = heads_of(indexer, indexer.wq_b(latent), hidden, indexer.n_heads)
    query = half_split_rope(query, cos.unsqueeze(2), sin.unsqueeze(2), indexer.qk_rope_head_dim)
    key = half_split_rope(indexer.k_norm(indexer.wk(hidden)), cos, sin, indexer.qk_rope_head_dim)
    return weighted(query, key, weights)


def glm5_next_scores(indexer, call):
    hidden, latent = call["kwargs"]["hidden_states"], call["kwargs"]["q_resid"]
    query, weights = heads_of(indexer, indexer.wq_b(latent), hidden, indexer.n_heads)
    key = indexer.k_norm(indexer.wk(hidden)).unflatten(1, (-1, 4))
    gates = (hidden @ indexer.index_kpool_compress_gate.mT).unflatten(1, (-1, 4)) + indexer.index_kpool_compress_ape
    return weighted(query, (gates.softmax(2) * key).sum(2), weights)


def v4_scores(indexer, call):
    return call["scorer"]


TOKENS = torch.arange(LENGTH).unsqueeze(1)
# By family: its scores; keys per candidate, of which the last has to be seen; candidates kept; where they begin.
CASES = {
    "deepseek_v32": (v32_scores, 1, 8, 0),
    "glm5_next": (glm5_next_scores, 4, 2, 0),
    "deepseek_v4": (v4_scores, 2, 4, LENGTH),
}


def record(model):
    calls = {}
    for layer in layers_of(model):
        call = calls[layer.indexer] = {}

        def note_input(module, args, kwargs, call=call):
            call.setdefault("args", tuple(v.detach() if isinstance(v, torch.Tensor) else v for v in args))
            call.setdefault("kwargs", {k: getattr(v, "detach", lambda v=v: v)() for k, v in kwargs.items()})

        def note_weights(module, args, output, call=call):
            call["attention"] = output[1].detach()

        def note_choice(module, args, output, call=call):
            call["chosen"] = output.long()

        def note_scores(module, args, output, call=call):
            call.setdefault("scorer", output)

        layer.indexer.register_forward_pre_hook(note_input, with_kwargs=True)
        layer.ancestors[2].register_forward_hook(note_weights)  # after the list of layers and the layer
        layer.indexer.register_forward_hook(note_choice)
        if hasattr(layer.indexer, "scorer"):
            layer.indexer.scorer.register_forward_hook(note_scores)
    return calls


def expected_loss(family, calls, is_dense):
    scores_of, width, kept, begin = CASES[family]
    loss = 0
    for indexer, call in calls.items():
        scores = scores_of(indexer, call)
        seen = (torch.arange(scores.shape[-1]) + 1) * width - 1 <= TOKENS
        scores = scores.masked_fill(~seen, -torch.inf)
        mass = call["attention"].sum(1)[..., begin:]
        mass = mass.unflatten(-1, (-1, width)).sum(-1) if begin == 0 else mass
        total, count = 0, 0
        for row, query in [(b, t) for b in range(len(IDS)) for t in range(LENGTH)]:
            best = scores[row, query][seen[query]].sort(descending=True).values
            chosen = [s for s in range(len(seen[query])) if seen[query, s]]
            if not is_dense:  # of equal scores, zeros of relu most often, those that the model took
                taken = call["chosen"][row, query]
                taken = taken if begin else taken[: kept * width : width] // width
                chosen = [s for s in taken.tolist() if s >= 0 and seen[query, s]]
                assert torch.equal(scores[row, query, chosen].sort(descending=True).values, best[:kept])
            if not chosen:
                continue
            p = mass[row, query, chosen] / mass[row, query, chosen].sum()
            total = total + (p * (p.log() - scores[row, query, chosen].log_softmax(-1))).sum()
            count += 1
        loss = loss + total / count
    return loss


@pytest.mark.parametrize("is_dense", [True, False], ids=["dense", "sparse"])
@pytest.mark.parametrize("family", CASES)
def test_loss_and_gradients_are_the_papers(family, is_dense):
    model = build(family, attention="eager").double()
    for name, parameter in indexer_parameters(model).items():
        if "kpool" in name or "position_bias" in name:  # zeros as they are built
            torch.nn.init.normal_(parameter)
    callback = IndexerTrainingCallback(warmup_steps=1, loss_coef=0.3)
    with InDouble():
        calls = record(model)
        callback.begin(model)
        callback.begin_step(model, 0 if is_dense else 1, num_passes=2)
        loss = loss_of(model, IDS)
        divergence = callback._observer.figures["kl"].item()
        callback.end()
        expected = expected_loss(family, calls, is_dense)
        gradients = torch.autograd.grad(expected * 0.3 / 2, indexer_parameters(model).values(), retain_graph=True)
        loss.backward()
    assert divergence == pytest.approx(expected.item(), rel=1e-6) and divergence > 0.01
    for (name, parameter), gradient in zip(indexer_parameters(model).items(), gradients, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n} {m}")
