import math

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM
from modeling_deepseek.routing import DeepseekRouter


def build(tiny, **settings):
    router = DeepseekRouter(DeepseekConfig(**{**tiny, **settings})).eval()
    router.init_weights(0.2)
    router.e_score_correction_bias.normal_(0, 0.1)
    return router


def plain_route(
    logits, bias, *, scoring_func, high, low=None, p=None, groups=1, open_groups=1, normalize=True, scale=1.0
):
    """One token at a time, from the definitions; the independent witness."""
    scores = [1 / (1 + math.exp(-x)) for x in logits]
    if scoring_func == "softmax":
        total = sum(math.exp(x) for x in logits)
        scores = [math.exp(x) / total for x in logits]
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(logits) // groups
    worth = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    best = sorted(range(groups), key=lambda g: -worth[g])[:open_groups]
    experts = sorted((e for e in range(len(logits)) if e // size in best), key=lambda e: -choice[e])[:high]
    whole, share, kept = sum(scores[e] for e in experts), 0.0, []
    for slot, e in enumerate(experts):
        if p is None or share < p or slot < low:
            kept.append(e)
        share += scores[e] / whole
    whole = sum(scores[e] for e in kept) if normalize else 1.0
    return {e: scale * scores[e] / whole for e in kept}


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("key_dim", [None, 6])
@pytest.mark.parametrize("dynamic", [None, 0.3, 0.6, 1.0])
def test_agrees_with_a_plain_router(tiny, scoring_func, norm_topk_prob, key_dim, dynamic):
    torch.manual_seed(0)
    settings = {"min_experts_per_tok": 1, "expert_top_p": dynamic} if dynamic else {}
    router = build(
        tiny,
        scoring_func=scoring_func,
        norm_topk_prob=norm_topk_prob,
        router_key_dim=key_dim,
        num_experts_per_tok=4,
        **settings,
    ).double()
    hidden = torch.randn(2, 19, 32)
    logits, weights, indices = router(hidden)
    if key_dim is None:
        expected_logits = hidden.view(-1, 32) @ router.weight.T.float()
    else:
        queries = hidden.view(-1, 32) @ router.query_weight.T.float()
        expected_logits = queries @ router.expert_keys.T.float() / math.sqrt(6)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5)
    counts = set()
    for row in range(38):
        expected = plain_route(
            logits[row].tolist(), router.e_score_correction_bias.tolist(), scoring_func=scoring_func, high=4, low=1,
            p=dynamic, groups=2, open_groups=1, normalize=norm_topk_prob, scale=2.5,
        )  # fmt: skip
        found = {e: w for e, w in zip(indices[row].tolist(), weights[row].tolist(), strict=True) if w}
        assert found == pytest.approx(expected, rel=1e-4)
        counts.add(len(found))
    if dynamic in (0.3, 0.6) and scoring_func == "sigmoid":
        assert counts <= {1, 2, 3} and len(counts) >= 1


def test_default_is_transformers_router_bit_for_bit(tiny):
    torch.manual_seed(0)
    ours, stock = build(tiny), DeepseekV3TopkRouter(DeepseekConfig(**tiny))
    stock.load_state_dict(ours.state_dict())
    hidden = torch.randn(3, 11, 32)
    for found, expected in zip(ours(hidden), stock(hidden), strict=True):
        assert torch.equal(found, expected)


def test_extended_path_equals_the_default_one(tiny):
    """p = 1 keeps every expert, so the dynamic router must give DeepSeek-V3's weights."""
    torch.manual_seed(0)
    fixed = build(tiny)
    dynamic = build(tiny, min_experts_per_tok=1, expert_top_p=1.0)
    dynamic.load_state_dict(fixed.state_dict(), strict=False)
    hidden = torch.randn(1, 40, 32)
    for route in (fixed, dynamic):
        _, weights, indices = route(hidden)
        route.dense = torch.zeros(40, 8).scatter(1, indices, weights)
    torch.testing.assert_close(dynamic.dense, fixed.dense, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "fused_moe"])
@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
def test_unused_slots_give_equal_outputs_and_gradients(tiny, input_ids, implementation, scoring_func):
    """Witness: the same experts with the router's weights multiplied out densely over all experts."""
    torch.manual_seed(0)
    top_p = {"sigmoid": 0.7, "softmax": 0.85}[scoring_func]
    settings = {"min_experts_per_tok": 1, "expert_top_p": top_p, "scoring_func": scoring_func}
    config = DeepseekConfig(**{**tiny, **settings, "num_hidden_layers": 1, "first_k_dense_replace": 0})
    model = DeepseekForCausalLM(config)
    moe = model.model.layers[0].mlp
    torch.nn.init.normal_(moe.gate.weight, std=0.3)
    torch.nn.init.normal_(moe.experts.gate_up_proj, std=0.2)
    torch.nn.init.normal_(moe.experts.down_proj, std=0.2)
    model.set_experts_implementation(implementation)
    hidden = torch.randn(2, 13, 32, requires_grad=True)
    output = moe(hidden)
    upstream = torch.randn_like(output)
    parameters = [hidden, moe.gate.weight, moe.experts.gate_up_proj, moe.experts.down_proj]
    found = torch.autograd.grad(output, parameters, upstream)

    _, weights, indices = moe.gate(hidden)
    number = (weights > 0).sum(-1)
    assert number.min() < number.max() == 3, "numbers differ, or the test shows nothing"
    dense = torch.zeros(26, 9).scatter(1, indices, weights)[:, :8]
    gate, up = torch.einsum("td,efd->tef", hidden.view(-1, 32), moe.experts.gate_up_proj).chunk(2, dim=-1)
    rows = torch.einsum("tef,edf->ted", torch.nn.functional.silu(gate) * up, moe.experts.down_proj)
    expected = torch.einsum("ted,te->td", rows, dense).view_as(hidden) + moe.shared_experts(hidden)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    for name, one, other in zip("xrgd", found, torch.autograd.grad(expected, parameters, upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("cast", [torch.nn.Module.bfloat16, torch.nn.Module.half, lambda m: m.to(torch.bfloat16)])
def test_bias_and_controller_stay_fp32(tiny, cast):
    router = build(tiny, min_experts_per_tok=1)
    router.e_score_correction_bias.fill_(0.5 + 0.001)  # In bf16 this is 0.5.
    cast(router)
    assert router.weight.dtype != torch.float32
    assert router.e_score_correction_bias.dtype == router.share.state.dtype == torch.float32
    assert router.e_score_correction_bias[0].item() == pytest.approx(0.501)
