"""LoRA over FP8 weights against PEFT's fold over what the codes stand for: output and every gradient."""

import pytest
import torch
from fp8_lora_cases import make_fp8_lora_case, names_of, reference, relative_errors, run, step
from moe_cases import make_ids

from deepseek_kernels.epilogue import Epilogue
from deepseek_kernels.fused_moe_fp8 import fused_moe_fp8
from deepseek_kernels.lora import LoraFactors

# bf16 rounds h, y and the results, in other places than the reference.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2}
SHAPE = {"T": 13, "H": 256, "I": 128, "E": 4, "K": 2}


def assert_equals_the_fold(case):
    tolerance = TOLERANCE[case["x"].dtype]
    got, wanted = step(case), reference(case)
    for name, one, (error, size) in zip(names_of(case), got, relative_errors(got, wanted), strict=True):
        assert error <= tolerance * size, f"{name}: {error / max(size, 1e-30):.1e}"
        assert one.isfinite().all()


@pytest.mark.parametrize("which", [("gate_up", "down"), ("gate_up",), ("down",)], ids="-".join)
@pytest.mark.parametrize("is_loaded", [False, True], ids=["weights", "codes"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_the_fold_with_all_gradients(dtype, is_loaded, which):
    assert_equals_the_fold(make_fp8_lora_case(dtype=dtype, is_loaded=is_loaded, which=which, **SHAPE))


@pytest.mark.parametrize("sizes", [(1, 200, 5, 1), (7, 100, 129, 20)], ids=str)
def test_sizes_off_the_block_and_ranks(sizes):
    T, H, I, r = sizes  # noqa: E741
    assert_equals_the_fold(make_fp8_lora_case(T=T, H=H, I=I, r=r))


@pytest.mark.parametrize("pattern", ["empty_experts", "one_expert", "all_unused"])
def test_routing_patterns(pattern):
    case = make_fp8_lora_case(**SHAPE)
    case["ids"] = make_ids(pattern, 13, 2, 4, torch.Generator().manual_seed(1)).long()
    assert_equals_the_fold(case)


def test_clamps_and_no_tokens():
    assert_equals_the_fold(make_fp8_lora_case(**SHAPE, activation=Epilogue(limit=0.7, alpha=1.702, shift=1.0)))
    got = step(make_fp8_lora_case(**{**SHAPE, "T": 0}))
    assert got[0].shape == (0, 256) and not any(one.any() for one in got)


def test_factors_in_fp32_on_bf16_get_gradients_in_fp32():
    case = make_fp8_lora_case(dtype=torch.bfloat16, factor_dtype=torch.float32, **SHAPE)
    case["weights"] = case["weights"].detach().bfloat16().requires_grad_()
    assert [one.dtype for one in step(case)] == [torch.bfloat16] * 3 + [torch.float32] * 4
    assert_equals_the_fold(case)


def test_without_gradients_the_same_bits_and_zeros_add_nothing():
    case = make_fp8_lora_case(**SHAPE)
    with_gradients = step(case)[0]
    with torch.no_grad():
        assert torch.equal(run(case), with_gradients)
        for name in ("gate_up_lora", "down_lora"):
            case[name].b.zero_()
        plain = fused_moe_fp8(case["x"], *case["projections"], case["ids"], case["weights"])
        assert torch.equal(run(case), plain)


def test_what_is_kept_for_the_backward_pass():
    """The ranks' share of every row beside what `fused_moe_fp8` keeps; no copy of B, nothing of a matrix's size."""

    def kept_bytes(case):
        owned = {t.data_ptr() for t in (case["x"], case["weights"], *case["projections"])}
        owned |= {t.data_ptr() for n in ("gate_up_lora", "down_lora") if n in case for t in (case[n].a, case[n].b)}
        kept = {}

        def note(tensor):
            if tensor.data_ptr() not in owned and tensor.is_floating_point():
                kept[tensor.data_ptr()] = tensor.numel() * tensor.itemsize
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            assert run(case).requires_grad
        return sum(kept.values())

    with_factors = kept_bytes(make_fp8_lora_case(**SHAPE))
    assert with_factors - kept_bytes(make_fp8_lora_case(which=(), **SHAPE)) == 13 * 2 * 2 * 4 * 4


def planted(case):
    """Faults that the comparison has to see: factors swapped between experts, no scaling, a lost router weight."""
    one = case["down_lora"]
    yield "scaling", {**case, "down_lora": LoraFactors(one.a, one.b, 0.45)}
    yield "neighbor", {**case, "down_lora": LoraFactors(one.a.roll(4, 0), one.b, one.scaling)}
    one = case["gate_up_lora"]
    yield "order of B", {**case, "gate_up_lora": LoraFactors(one.a, one.b.view(-1, 4, 4).mT.reshape(one.b.shape), 0.5)}


def test_planted_faults_are_seen():
    case = make_fp8_lora_case(**SHAPE)
    wanted = reference(case)
    for name, broken in planted(case):
        errors = [error / size for error, size in relative_errors([run(broken).detach()], wanted[:1])]
        assert max(errors) > 1e-2, name


def test_a_nan_stays_a_nan():
    case = make_fp8_lora_case(**SHAPE)
    with torch.no_grad():
        case["gate_up_lora"].a[0, 0] = torch.nan  # of expert 0
    is_touched = (case["ids"] == 0).any(1)
    output = run(case)
    assert output[is_touched].isnan().all() and output[~is_touched].isfinite().all() and is_touched.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"gate_up_lora": LoraFactors(c.a[:0], c.b[:, :0])}, "gate_up_lora.a: got shape (0, 256), expected"),
        (lambda c: {"gate_up_lora": LoraFactors(c.a, c.b.t())}, "gate_up_lora.b: got shape (16, 256), expected"),
        (lambda c: {"gate_up_lora": LoraFactors(c.a, c.b.int())}, "gate_up_lora.b: got torch.int32 on cpu, expected"),
        (lambda c: {"gate_up_lora": LoraFactors(c.a.to("meta"), c.b)}, "gate_up_lora.a: got torch.float32 on meta"),
    ],
)
@pytest.mark.parametrize("is_loaded", [False, True], ids=["weights", "codes"])
def test_factors_that_do_not_fit_are_refused(is_loaded, change, message):
    case = make_fp8_lora_case(is_loaded=is_loaded, **SHAPE)
    with pytest.raises(ValueError) as error:
        run({**case, **change(case["gate_up_lora"])})
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_weights_that_train_themselves_are_refused():
    case = make_fp8_lora_case(**SHAPE)
    case["projections"][1].requires_grad_()
    with pytest.raises(ValueError, match="down_proj: got requires_grad, expected weights and a bias that are frozen"):
        run(case)
