"""Every experts class of the installed transformers: `fused_moe` equals its own forward, or refuses it by name.

A family that gives wrong numbers without a word is the worst that can happen here, and new ones come with each
release. So the classes are found in the source, built with sizes alone, and each must be in one of two groups.
"""

import importlib
import inspect
import re

import pytest
import torch
import transformers
from packaging.version import Version
from tiny_families import find_experts_classes

import modeling_deepseek.fused_experts as fused_experts
from modeling_deepseek.fused_fp8 import fused_moe_fp8_experts_forward

# Computing something that the operator's epilogue does not, by what it is refused for.
REFUSED = {
    "Inkling2Experts": "the activation Inkling2SoftcappedSwiGLU|its own _apply_gate",
    "MuseSparkExperts": "has_post_expert_norm=True",
    "NemotronHExperts": "has_gate=False",
}


CLAMPED = {
    "DeepseekV4Experts",
    "Glm5NextTextExperts",
    "GptOssExperts",
    "HYV4Experts",
    "MiniMaxM3VLExperts",
    "OpenAIPrivacyFilterExperts",
}


CLASSES = find_experts_classes()
assert len(CLASSES) > 20


class AnyConfig:
    """Answers every question about sizes, so that one does for all classes; sizes are small and differ."""

    _experts_implementation = "eager"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        for pattern, value in (
            (r"act", "silu"),
            (r"(num|n)_.*experts|num_experts|moe_num", 5),
            (r"top_?k|per_tok", 2),
            (r"moe_intermediate|ffn|expert.*(dim|size)|moe_.*(dim|size)", 20),
            (r"intermediate", 20),
            (r"hidden|dim|size", 12),
            (r"eps", 1e-6),
            (r"dtype", torch.float32),
        ):
            if re.search(pattern, name):
                return value
        return 0.5  # limits and factors: small enough for a clamp to show


def build(module, name):
    torch.manual_seed(0)
    experts = getattr(importlib.import_module(module), name)(AnyConfig())
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return experts


def run(experts, forward, dtype, rounded_to=None):
    """Output and every gradient under one unused slot per token or so, with router weights of another dtype.

    GPT-OSS and the privacy filter know of no unused slot in their own forward pass; there every slot is used.
    """
    takes_unused = "num_experts + 1" in inspect.getsource(type(experts).forward.__wrapped__)
    generator = torch.Generator().manual_seed(1)
    hidden = experts.down_proj.shape[2 if experts.is_transposed else 1]
    x = torch.randn(9, hidden, generator=generator).to(rounded_to or dtype).to(dtype).requires_grad_()
    num_indices = experts.num_experts + takes_unused
    indices = torch.stack([torch.randperm(num_indices, generator=generator)[:3] for _ in range(9)])
    weights = torch.rand(9, 3, generator=generator).requires_grad_()
    experts.zero_grad()
    output = forward(experts, x, indices, weights)
    output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))
    return [output.detach(), x.grad, weights.grad, *(parameter.grad for parameter in experts.parameters())]


def test_how_many_are_refused():
    least = 62 if Version(transformers.__version__) >= Version("5.23") else 52  # older releases have fewer classes
    assert len(CLASSES) - len(REFUSED) >= least and {name for _, name in CLASSES} >= REFUSED.keys()


@pytest.mark.slow
@pytest.mark.parametrize("module,name", CLASSES, ids=[name for _, name in CLASSES])
def test_equal_or_refused(module, name):
    experts = build(module, name)
    own_forward = type(experts).forward.__wrapped__
    if name in REFUSED:
        with pytest.raises(ValueError, match=f"fused_moe does not compute .*{name}") as caught:
            run(experts, fused_experts.fused_moe_experts_forward, torch.float32)
        assert re.search(REFUSED[name], str(caught.value)) and "\n" not in str(caught.value)
        return
    for one, other in zip(
        run(experts, fused_experts.fused_moe_experts_forward, torch.float32),
        run(experts, own_forward, torch.float32),
        strict=True,
    ):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)
    exact, experts = run(experts.bfloat16().float(), own_forward, torch.float32, torch.bfloat16), experts.bfloat16()
    got = run(experts, fused_experts.fused_moe_experts_forward, torch.bfloat16)
    if name in CLAMPED:
        # Which side of a clamp h falls on depends on its rounding, and so do the gradients: their own bf16 decides,
        # and for the one that computes in fp32 the output alone.
        gradients = run(experts, own_forward, torch.bfloat16)[1:]
        exact = [exact[0], *(gradients if name != "OpenAIPrivacyFilterExperts" else [])]
    for one, other in zip(got, exact, strict=False):
        error = (one.float() - other.float()).norm() / other.float().norm()
        assert error < 0.02, f"relative error {error:.3f} in bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("module,name", CLASSES, ids=[name for _, name in CLASSES])
def test_fp8_is_near_or_refused(module, name):
    experts = build(module, name)
    if name in REFUSED:
        with pytest.raises(ValueError, match=f"fused_moe does not compute .*{name}"):
            run(experts, fused_moe_fp8_experts_forward, torch.float32)
        return
    exact = run(experts, type(experts).forward.__wrapped__, torch.float32)
    got = run(experts, fused_moe_fp8_experts_forward, torch.float32)
    # Three significant bits in each operand; which side of a clamp h falls on changes with them.
    for one, other in zip(got, exact, strict=True):
        assert 0 < (one - other).norm() <= (0.5 if name in CLAMPED else 0.12) * other.norm()
