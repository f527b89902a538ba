"""Clamps, alpha, shift, interleaved weights and biases of `fused_moe` on a CPU: the reference, gradients, refusals."""

import math

import pytest
import torch
from epilogue_cases import EPILOGUES, assert_equals_reference, biased_case, gradients
from moe_cases import make_case

from deepseek_kernels.cpu import decode, large_buffers, staged
from deepseek_kernels.epilogue import Epilogue
from deepseek_kernels.fused_moe import fused_moe


@pytest.fixture(params=["few", "small", "large"])
def either_path(request, monkeypatch):
    if request.param != "few":
        monkeypatch.setattr(decode, "MAX_ROWS", -1)
    if request.param == "large":
        monkeypatch.setattr(staged, "MAX_BYTES", -1)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_output_and_every_gradient_equal_the_reference(dtype, name, has_bias, either_path):
    case = biased_case(dtype, T=33, H=35, I=19, has_bias=has_bias)
    assert_equals_reference(case, EPILOGUES[name], dtype)


@pytest.mark.parametrize("pattern", ["empty_experts", "one_expert", "all_unused"])
def test_routing_patterns(pattern, either_path):
    for T in (0, 1, 7):
        case = biased_case(torch.float32, T=T, pattern=pattern)
        if T:
            assert_equals_reference(case, EPILOGUES["gpt_oss"], torch.float32)
        else:
            assert fused_moe(*case[:5], gate_up_bias=case[5], down_bias=case[6]).shape == case[0].shape


def test_the_limit_is_reached_on_every_side():
    """Or the tests above would not see a clamp that is missing."""
    case = biased_case(torch.float32, T=33, H=35, I=19)
    limits = {side: fused_moe(*case[:5], activation=side).detach() for side in (Epilogue(limit=0.7), Epilogue())}
    one, other = limits.values()
    assert (one - other).norm() > 0.05 * other.norm()
    h = torch.nn.functional.linear(case[0], case[1].flatten(0, 1)).view(33, 6, 2, 19)
    for part in (h[:, :, 0] > 0.7, h[:, :, 1] > 0.7, h[:, :, 1] < -0.7):
        assert 0.1 < part.float().mean() < 0.4


def test_gradcheck():
    case = biased_case(torch.float64, T=4, H=3, I=2, E=3, K=2)
    for epilogue in EPILOGUES.values():
        function = lambda x, w1, w2, s, b1, b2, form=epilogue: fused_moe(  # noqa: E731
            x, w1, w2, case[3], s, activation=form, gate_up_bias=b1, down_bias=b2
        )
        assert torch.autograd.gradcheck(function, [t for i, t in enumerate(case) if i != 3])


def test_a_plain_epilogue_gives_the_bits_of_its_activation(either_path):
    for dtype in (torch.float32, torch.bfloat16):
        by_name = gradients(fused_moe, biased_case(dtype, T=33, has_bias=False), "silu")
        by_epilogue = gradients(fused_moe, biased_case(dtype, T=33, has_bias=False), Epilogue("silu"))
        assert all(torch.equal(one, other) for one, other in zip(by_name, by_epilogue, strict=True))


def test_forward_is_the_same_with_gradients_and_without(either_path):
    case = biased_case(torch.bfloat16, T=33)
    settings = {"activation": EPILOGUES["gpt_oss"], "gate_up_bias": case[5], "down_bias": case[6]}
    with torch.no_grad():
        alone = fused_moe(*case[:5], **settings)
    assert torch.equal(fused_moe(*case[:5], **settings).detach(), alone)


def test_nan_stays_nan_through_the_clamps(either_path):
    case = biased_case(torch.float32, T=9, pattern="every_expert", has_bias=False)
    with torch.no_grad():
        case[0][4] = float("nan")
        output = fused_moe(*case, activation=EPILOGUES["deepseek_v4"])
    assert output[4].isnan().all() and output[:4].isfinite().all() and output[5:].isfinite().all()


def test_dirty_buffers_do_not_show(monkeypatch, either_path):
    def poison(tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**30)

    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty"), (large_buffers, "empty")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, original=original, **k: poison(original(*a, **k)))
    assert_equals_reference(biased_case(torch.float32, T=7), EPILOGUES["gpt_oss"], torch.float32)


def test_a_bias_alone_is_trained_and_frozen_ones_get_no_gradient():
    full = gradients(fused_moe, biased_case(torch.float32, T=9), EPILOGUES["gpt_oss"])
    for trained in (5, 6):
        case = biased_case(torch.float32, T=9)
        for i, tensor in enumerate(case):
            if tensor.is_floating_point():
                tensor.requires_grad_(i == trained)
        gradients(fused_moe, case, EPILOGUES["gpt_oss"])
        assert [i for i, t in enumerate(case) if t.grad is not None] == [trained]
        torch.testing.assert_close(case[trained].grad, full[trained])


def test_compiles_as_one_graph():
    case = biased_case(torch.float32, T=9)
    compiled = torch.compile(fused_moe, fullgraph=True, backend="aot_eager")
    got = gradients(compiled, case, EPILOGUES["gpt_oss"])
    wanted = gradients(fused_moe, biased_case(torch.float32, T=9), EPILOGUES["gpt_oss"])
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def test_autocast_takes_biases_of_the_weights_type():
    case = biased_case(torch.float32, T=9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = fused_moe(*case[:5], activation=EPILOGUES["gpt_oss"], gate_up_bias=case[5], down_bias=case[6])
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.any() for t in case if t.is_floating_point())


def test_text_and_back():
    for epilogue in (*EPILOGUES.values(), Epilogue("gelu"), Epilogue(limit=1e-7, alpha=0.1, shift=-3e5)):
        assert Epilogue.read(epilogue.text) == epilogue
    assert Epilogue().text == "silu" and Epilogue("swish") == Epilogue()


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"limit": 0.0}, "limit: got 0.0, expected a finite number above 0"),
        ({"limit": -7.0}, "limit: got -7.0"),
        ({"limit": math.nan}, "limit: got nan"),
        ({"alpha": 0.0}, "alpha: got 0.0"),
        ({"shift": math.inf}, "shift: got inf"),
        ({"activation": "gelu", "alpha": 1.702}, "alpha: got 1.702 with activation 'gelu', expected 1"),
        ({"activation": "relu"}, "activation: got 'relu'"),
    ],
)
def test_settings_that_contradict_or_mean_nothing(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        Epilogue(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name,bias,message",
    [
        ("gate_up_bias", torch.zeros(6, 5), r"gate_up_bias: got shape \(6, 5\), expected \(6, 10\)"),
        ("gate_up_bias", torch.zeros(6, 10, dtype=torch.bfloat16), "gate_up_bias: got dtype torch.bfloat16"),
        ("down_bias", torch.zeros(12), r"down_bias: got shape \(12,\), expected \(6, 12\)"),
        ("down_bias", 0.0, "down_bias: got float, expected a tensor"),
        ("down_bias", torch.zeros(6, 12, device="meta"), "down_bias: got device meta, expected cpu"),
    ],
)
def test_biases_that_do_not_fit(name, bias, message):
    with pytest.raises(ValueError, match=message):
        fused_moe(*make_case(torch.float32), **{name: bias})
