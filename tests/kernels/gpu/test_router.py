"""`fused_router`'s plain reference against transformers' DeepSeek-V3 router, and its errors."""

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from deepseek_kernels.gpu.router import fused_router


def test_equals_the_router_of_transformers():
    config = DeepseekV3Config(
        hidden_size=8, n_routed_experts=12, num_experts_per_tok=4, n_group=3, topk_group=2, routed_scaling_factor=2.5
    )
    theirs = DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(theirs.weight)
    # Scores stay positive: where a bias makes them negative, transformers opens closed groups again.
    theirs.e_score_correction_bias.uniform_(0, 0.3)
    logits, weights, indices = theirs(torch.randn(1, 30, 8))
    ours = fused_router(logits, top_k=4, bias=theirs.e_score_correction_bias, num_groups=3, topk_groups=2, scale=2.5)
    order, our_order = indices.argsort(-1), ours[0].argsort(-1)
    assert torch.equal(indices.gather(1, order), ours[0].gather(1, our_order))
    torch.testing.assert_close(ours[1].gather(1, our_order), weights.gather(1, order))


def test_softmax_normalized_is_softmax_over_the_chosen():
    logits = torch.randn(5, 9)
    indices, weights = fused_router(logits, top_k=3, scoring="softmax")
    torch.testing.assert_close(weights, logits.topk(3)[0].softmax(-1))
    assert torch.equal(indices, logits.topk(3)[1])


def test_no_token_at_all():
    indices, weights = fused_router(torch.randn(0, 12), top_k=4, num_groups=3, topk_groups=2)
    assert indices.shape == weights.shape == (0, 4)


def test_number_of_experts_follows_the_share():
    logits = torch.tensor([[4.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    indices, weights = fused_router(logits, top_k=4, scoring="softmax", min_k=1, unused_share=torch.tensor(0.2))
    # Shares: 0.95 and three of 0.02; four of 0.25, of which what is left after three still exceeds 0.2.
    assert (indices == 4).sum(1).tolist() == [3, 0]
    torch.testing.assert_close(weights.sum(1), torch.ones(2))


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"top_k": 0}, "top_k: got 0, expected 1 to 12"),
        ({"top_k": 13}, "top_k: got 13"),
        ({"top_k": 2, "num_groups": 5}, "num_groups: got 5"),
        ({"top_k": 5, "num_groups": 3}, "leaves at least 5 experts"),
        ({"top_k": 2, "scoring": "relu"}, "scoring: got 'relu', expected one of sigmoid, softmax"),
        ({"top_k": 2, "min_k": 1}, "unused_share"),
        ({"top_k": 2, "bias": torch.zeros(11)}, r"bias: got shape \(11,\), expected a tensor of shape \[12\]"),
        ({"top_k": 2, "bias": torch.zeros(2, 6)}, r"bias: got shape \(2, 6\)"),
        (
            {"top_k": 2, "bias": torch.zeros(12, device="meta")},
            "bias: got device meta, expected that of router_logits",
        ),
        ({"top_k": 2, "bias": [0.0] * 12}, "bias: got list"),
        ({"top_k": 2, "min_k": 1, "unused_share": 0.2}, r"unused_share: got float, expected a tensor of shape \[1\]"),
        ({"top_k": 2, "min_k": 1, "unused_share": torch.zeros(2)}, r"unused_share: got shape \(2,\)"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        fused_router(torch.randn(2, 12), **settings)
