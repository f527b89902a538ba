"""The FP8 Triton kernels, run: codes bit for bit against ``fp8``, the layer against the CPU path, its witness.

In Triton's interpreter (``test_in_interpreter.py``) or on the GPU where there is one. H and I straddle a group of 128
and a tile, so that every loop over groups has two steps and the last of each is short.
"""

import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from fp8_cases import codes_of, gradients, make_layer, special_rows
from fp8_witness import witness
from moe_cases import make_ids, runs_descriptors

from deepseek_kernels import fp8, fused_moe_fp8
from deepseek_kernels.cpu import fp8_experts as fp8_experts_cpu
from deepseek_kernels.epilogue import Epilogue
from deepseek_kernels.gpu import fp8_experts, fp8_quantize, fp8_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A GPU refuses float32; in the interpreter it shows that nothing but the order of sums differs.
EXACT = torch.bfloat16 if DEVICE == "cuda" else torch.float32
NAMES = ("output", "hidden_states", "gate_up_proj", "down_proj", "topk_weights")
# Relative RMS. A sum in another order may round to another code now and then, and bf16 rounds each row of dx.
RMS = {torch.float32: 2e-4, torch.bfloat16: 8e-3, torch.float16: 2e-3}
slow = pytest.mark.slow
SHAPE = {"T": 7, "H": 140, "I": 136, "E": 3}
pytestmark = pytest.mark.usefixtures("guarded_buffers")


def same_bits(got, wanted):
    """Codes equal bit for bit; a NaN is a NaN."""
    got, wanted = got.cpu().contiguous(), wanted.cpu().contiguous()
    is_nan = wanted.isnan()
    assert torch.equal(got.isnan(), is_nan)
    assert torch.equal(got.view(torch.uint8)[~is_nan], wanted.view(torch.uint8)[~is_nan])


def same_scales(got, wanted):
    assert torch.equal(got.cpu().nan_to_num(-1), wanted.cpu().nan_to_num(-1))


def hard_rows():
    """Edges of the codes, all codes, the middles between them, NaN, infinity and -0."""
    x = torch.zeros(14, 300)
    x[:8] = special_rows()
    codes = torch.arange(256, dtype=torch.uint8).view(fp8.FP8).float().nan_to_num(0)
    x[8, :256], x[9, :256] = codes, (codes + codes.roll(-1)) / 2
    x[10, 3], x[11, 130], x[12, 5] = float("nan"), float("inf"), -0.0
    x[13] = torch.linspace(-448, 448, 300)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_have_the_same_bits(dtype):
    x = hard_rows().to(dtype)
    wanted, wanted_scales = fp8.quantize_rows(x)
    codes, scales = fp8_quantize.quantize_rows(x.to(DEVICE))
    same_bits(codes[:, :300], wanted)
    same_scales(scales, wanted_scales)
    is_number = scales[:, 2].isfinite()
    assert not codes[is_number, 300:].view(torch.uint8).any() and codes.shape == (14, 384)


def test_halves_each_begin_a_group_and_rows_without_use_are_left_alone():
    x, used = torch.randn(9, 2 * 140), torch.tensor([7], dtype=torch.int32, device=DEVICE)
    codes, scales = fp8_quantize.quantize_halves(x.to(DEVICE), used)
    for half, part in enumerate(x.chunk(2, dim=1)):
        wanted, wanted_scales = fp8.quantize_rows(part)
        same_bits(codes[:7, half * 256 : half * 256 + 140], wanted[:7])
        same_scales(scales[:7, 2 * half : 2 * half + 2], wanted_scales[:7])
    assert scales[7:].isnan().all()  # what the buffer was filled with


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_blocks_have_the_same_bits(parts, transpose):
    weights = torch.randn(2, parts * 140, 300).bfloat16()
    weights[0, 3, 5], weights[1, 130:] = float("inf"), 0
    codes, scales = fp8_quantize.quantize_blocks(weights.to(DEVICE), parts=parts, transpose=transpose)
    for expert in range(2):
        mine, my_scales = codes[expert].view(torch.uint8).cpu(), scales[expert].cpu()
        mine, my_scales = (mine.T, my_scales.T) if transpose else (mine, my_scales)
        assert mine.shape == (256 * parts, 384)
        for part, matrix in enumerate(weights[expert].chunk(parts)):
            wanted, wanted_scales = fp8.quantize_blocks(matrix)
            same_bits(mine[part * 256 : part * 256 + 140, :300].contiguous().view(fp8.FP8), wanted)
            same_scales(my_scales[2 * part : 2 * part + 2], wanted_scales)


@pytest.mark.parametrize("epilogue", [Epilogue(), Epilogue(limit=0.7, alpha=1.702, shift=1.0), Epilogue("gelu")])
def test_activated_rows(epilogue):
    """Activation and codes in one pass; an exponential that differs in its last bit changes a code now and then."""
    h = torch.randn(9, 2 * 140)
    used = torch.tensor([9], dtype=torch.int32, device=DEVICE)
    codes, scales = fp8_quantize.activate_rows(h.to(DEVICE), epilogue.text, used)
    wanted, wanted_scales = fp8.quantize_rows(epilogue.apply(h))
    same_scales(scales, wanted_scales)
    differs = codes[:, :140].cpu().view(torch.uint8) != wanted.contiguous().view(torch.uint8)
    assert differs.float().mean() < 0.005 and not codes[:, 140:].view(torch.uint8).any()


def assert_close(got, wanted, dtype):
    for name, one, other in zip(NAMES, got, wanted, strict=True):
        error, size = (one.double() - other.double()).norm(), other.double().norm()
        assert one.shape == other.shape and error <= RMS[dtype] * size, f"{name}: {error / size:.1e}"


def assert_equals_witness(dtype=EXACT, pattern=None, settings=None, **shape):
    def case():
        made = make_layer(**{**SHAPE, **shape}, dtype=dtype, device=DEVICE)
        if pattern is not None:
            made[3] = make_ids(pattern, *made[3].shape, SHAPE["E"], torch.Generator().manual_seed(1)).long().to(DEVICE)
        return made

    got = gradients(fused_moe_fp8.fused_moe_fp8, case(), **(settings or {}))
    assert_close(got, witness(case(), **(settings or {})), dtype)


@pytest.mark.parametrize(
    "pattern", ["empty_experts", *(pytest.param(p, marks=slow) for p in ("some_unused", "all_unused"))]
)
def test_routing_patterns(pattern):
    assert_equals_witness(pattern=pattern)


@slow
@pytest.mark.parametrize("pattern", ["some_unused", "empty_experts", "one_expert", "all_unused", "skewed"])
@pytest.mark.parametrize("T", [1, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, EXACT])
def test_routing_patterns_in_every_dtype(dtype, T, pattern):
    assert_equals_witness(dtype, pattern, T=T)


def test_two_bytes_an_element():
    assert_equals_witness(torch.bfloat16)


@pytest.mark.parametrize("sizes", [(16, 5), *(pytest.param(s, marks=slow) for s in ((256, 128), (300, 7)))])
def test_sizes_off_the_group(sizes):
    assert_equals_witness(H=sizes[0], I=sizes[1])


ODD_SIZES = (1, 5, 16, 17, 31, 64, 100, 127, 129)


@pytest.mark.parametrize(
    "tiles,H,I",
    [
        ("FEW_ROWS", 17, 5),
        *(pytest.param("FEW_ROWS", H, I, marks=slow) for H in ODD_SIZES for I in ODD_SIZES),  # noqa: E741
        *(pytest.param(t, *s, marks=slow) for t in ("SOME_ROWS", "MANY_ROWS") for s in ((1, 1), (16, 5), (129, 100))),
    ],
)
def test_production_tiles_at_odd_sizes(tiles, H, I, monkeypatch):  # noqa: E741
    """What is beyond a matrix and within its group is zeros, never what a buffer was filled with."""
    monkeypatch.setattr(fp8_experts, "choose_fp8_tiles", lambda *arguments: getattr(fp8_tiles, tiles))
    assert_equals_witness(torch.bfloat16, H=H, I=I)


def test_no_tokens():
    output, *grads = gradients(
        fused_moe_fp8.fused_moe_fp8, make_layer(**{**SHAPE, "T": 0}, dtype=EXACT, device=DEVICE)
    )
    assert output.shape == (0, 140) and not any(grad.any() for grad in grads)


@pytest.mark.slow
def test_epilogue_and_biases():
    def run(function):
        generator = torch.Generator().manual_seed(6)
        biases = [torch.randn(n, generator=generator).to(DEVICE, EXACT) for n in ((3, 272), (3, 140))]
        biases = [bias.requires_grad_() for bias in biases]
        settings = {"activation": Epilogue(limit=0.7, alpha=1.702, shift=1.0)}
        settings |= dict(zip(("gate_up_bias", "down_bias"), biases, strict=True))
        case = make_layer(**SHAPE, dtype=EXACT, device=DEVICE)
        return function(case, **settings), [bias.grad for bias in biases]

    got, grads = run(lambda case, **settings: gradients(fused_moe_fp8.fused_moe_fp8, case, **settings))
    wanted, wanted_grads = run(witness)
    assert_close(got, wanted, EXACT)
    for one, other in zip(grads, wanted_grads, strict=True):
        assert (one - other).norm() <= 2 * RMS[EXACT] * other.norm()


@pytest.mark.slow
def test_codes_of_the_activation_from_the_first_kernel_or_from_a_pass_of_their_own(monkeypatch):
    """A tile of whole groups writes them itself, and then h only for a backward pass; the bits of y are the same."""
    made, sizes, original = [], {}, fp8_experts.choose_fp8_tiles

    def choose(*arguments):
        tiles = original(*arguments)
        return replace(tiles, gate_up=replace(tiles.gate_up, **sizes))

    monkeypatch.setattr(fp8_experts, "choose_fp8_tiles", choose)
    case = [t.detach() for t in make_layer(**SHAPE, dtype=EXACT, device=DEVICE)]
    order, weights = fp8_experts.route(case[3], SHAPE["E"]), fp8_experts_cpu.Weights(*case[1:3])
    by_descriptor = runs_descriptors()
    for columns, is_descriptor, keep in (
        (128, by_descriptor, False),
        (128, by_descriptor, True),
        (128, False, True),
        (64, False, True),
        (64, by_descriptor, True),
    ):
        sizes |= {"block_n": columns, "uses_descriptor": is_descriptor}
        made.append(fp8_experts.forward(case[0], weights, order, case[4], "silu", None, keep))
    used = int(order.expert_start[-1])
    assert torch.equal(made[0][0], made[1][0]) and made[0][1].numel() == 0
    for both in made[2:]:
        for one, other in zip(both, made[1], strict=True):
            assert (one[:used] - other[:used]).norm() <= RMS[EXACT] * other[:used].norm()


def frozen_case(H, scale=1.0):
    case = make_layer(T=7, H=H, I=128, E=3, dtype=EXACT, device=DEVICE)
    gate_up, down, scales = codes_of(case)
    scales["down_scales"] = scales["down_scales"] * scale
    return [case[0].detach().requires_grad_(), gate_up, down, case[3], case[4].detach().requires_grad_()], scales


@pytest.mark.parametrize("H", [140, pytest.param(256, marks=slow)])
def test_codes_of_a_checkpoint_with_scales_of_its_own(H):
    """Not powers of two, and, with H of 140, blocks that the last rows and columns do not fill."""
    (case, scales), (other, _) = frozen_case(H, 1.3), frozen_case(H)

    def run(*operands, **settings):
        return fused_moe_fp8.fused_moe_fp8(*operands, **scales, **settings)

    got, wanted = gradients(run, case), witness(other, run)
    for i in (0, 1, 4):
        assert (got[i] - wanted[i]).norm() <= RMS[EXACT] * wanted[i].norm(), NAMES[i]
    assert case[1].grad is None and case[2].grad is None


def test_codes_with_blocks_that_the_kernels_do_not_take_are_refused():
    case = make_layer(T=4, H=128, I=160, dtype=EXACT, device=DEVICE)
    gate_up, down, scales = codes_of(case)
    with pytest.raises(
        ValueError, match="down_proj: got 160 columns of FP8 codes on a GPU, expected a multiple of 128"
    ):
        fused_moe_fp8.fused_moe_fp8(case[0], gate_up, down, *case[3:], **scales)
    scales = {
        name: scale.repeat_interleave(2, 2)[:, :, :size]
        for (name, scale), size in zip(scales.items(), (2, 3), strict=True)
    }
    with pytest.raises(ValueError, match=r"block: got \(128, 64\) on a GPU, expected \(128, 128\)"):
        fused_moe_fp8.fused_moe_fp8(case[0], gate_up, down, *case[3:], **scales, block=(128, 64))


@slow
def test_two_runs_are_bit_equal():
    runs = [gradients(fused_moe_fp8.fused_moe_fp8, make_layer(**SHAPE, dtype=EXACT, device=DEVICE)) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_nan_stays_nan_and_stays_in_its_token():
    case = make_layer(**{**SHAPE, "T": 9}, dtype=EXACT, device=DEVICE)
    case[3] = torch.zeros_like(case[3])
    with torch.no_grad():
        case[0][4] = float("nan")
        output = fused_moe_fp8.fused_moe_fp8(*case)
    assert output[4].isnan().all() and output[:4].isfinite().all() and output[5:].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [(0, 1, 2), *(pytest.param(s, marks=slow) for s in ((0,), (1, 2)))])
def test_only_wanted_gradients_are_computed(frozen):
    full, case = (make_layer(**SHAPE, dtype=EXACT, device=DEVICE) for _ in range(2))
    for i in frozen:
        case[i].requires_grad_(False)
    wanted = gradients(fused_moe_fp8.fused_moe_fp8, full)
    gradients(fused_moe_fp8.fused_moe_fp8, case)
    for i, grad in zip((0, 1, 2, 4), wanted[1:], strict=True):
        assert case[i].grad is None if i in frozen else torch.equal(case[i].grad, grad)


@pytest.mark.parametrize(
    "fault",
    ["scales not transposed", *(pytest.param(f, marks=slow) for f in ("a neighbor's scale", "gate's scale for up"))],
)
def test_planted_faults_are_seen(fault, monkeypatch):
    """The witness is near enough to tell them."""
    original = fp8_experts.gate_up_codes

    def wrong(weights, *, transpose=False):
        codes, scales = original(weights, transpose=transpose)
        if fault == "a neighbor's scale":
            scales = scales.roll(1, 2)
        elif fault == "gate's scale for up" and not transpose:
            scales = scales[:, :2].repeat(1, 2, 1)
        elif fault == "scales not transposed" and transpose:
            scales = scales.transpose(1, 2).reshape(scales.shape)
        return codes, scales

    monkeypatch.setattr(fp8_experts, "gate_up_codes", wrong)
    with pytest.raises(AssertionError):
        assert_equals_witness()
