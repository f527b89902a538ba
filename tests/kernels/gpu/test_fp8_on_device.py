"""FP8 experts at the sizes that training runs with, on a GPU: products, the layer tile by tile, repeatability.

The witness is the CPU path, run on the GPU's tensors: the same codes, summed by torch in fp32.
"""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")
if not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)):
    pytest.skip("needs a GPU with FP8 products", allow_module_level=True)

from fp8_cases import codes_of, decibels, gradients, make_layer
from fp8_witness import witness
from moe_cases import make_ids, runs_descriptors

from deepseek_kernels import fp8
from deepseek_kernels.cpu.fp8_experts import Weights
from deepseek_kernels.epilogue import Epilogue
from deepseek_kernels.expert_loop import TILE_TOLERANCE, expert_loop, largest_tile_error
from deepseek_kernels.fused_moe_fp8 import fused_moe_fp8
from deepseek_kernels.gpu import fp8_experts
from deepseek_kernels.gpu.fp8_down_backward import down_backward_fp8
from deepseek_kernels.gpu.fp8_gate_up import gate_up_fp8
from deepseek_kernels.gpu.fp8_grouped_gemm import grouped_gemm_fp8
from deepseek_kernels.gpu.fp8_quantize import quantize_halves, quantize_rows
from deepseek_kernels.gpu.fp8_tiles import choose_fp8_tiles

NAMES = ("output", "hidden_states", "gate_up_proj", "down_proj", "topk_weights")
PATTERNS = ["some_unused", "empty_experts", "one_expert", "all_unused", "skewed", "every_expert"]
LEAVES = (0, 1, 2, 4)
# Of a 128 x 128 tile's norm. A result next to a rounding's edge takes another code now and then, in fp16 as well.
TOLERANCE = {torch.bfloat16: TILE_TOLERANCE[torch.bfloat16], torch.float16: 1e-2}
# bf16 rounds by 1.7e-3 of a number's size; a tensor core's short sums over 128 add little to it.
PRODUCT_TOLERANCE = 2.5e-3
pytestmark = pytest.mark.gpu


def case_of(rows=1000, H=512, I=256, E=4, K=2, *, dtype=torch.bfloat16, pattern="some_unused", seed=0):  # noqa: E741
    """A case of `rows` slots per expert, used or not."""
    K = E if pattern == "every_expert" else K
    case = make_layer(rows * E // K, H, I, E, K, dtype=dtype, device="cuda", seed=seed)
    case[3] = make_ids(pattern, *case[3].shape, E, torch.Generator().manual_seed(seed)).long().cuda()
    return case


def assert_tiles_equal_witness(make, dtype=torch.bfloat16, **settings):
    got, wanted = gradients(fused_moe_fp8, make(), **settings), witness(make(), **settings)
    errors = {name: largest_tile_error(*pair) for name, *pair in zip(NAMES, got, wanted, strict=True)}
    assert all(error <= TOLERANCE[dtype] for error in errors.values()), errors


def relative(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("rows,H,I", [(300, 2048, 768), (40, 520, 264), (12, 520, 264)])
def test_every_product_of_codes(rows, H, I):  # noqa: E741
    """Against float64 products of what the codes stand for; H 520 and I 264 leave short groups."""
    x, gate_up, down, ids, shares = (t.detach() for t in case_of(rows, H, I))
    E, K, dtype = gate_up.shape[0], ids.shape[1], torch.bfloat16
    weights, order = Weights(gate_up, down), fp8_experts.route(ids, E)
    tiles, used = choose_fp8_tiles(x.device, ids.numel(), E), int(order.expert_start[-1])
    slots = order.row_slot[:used].long()
    tokens, experts = slots // K, ids.flatten()[slots]
    W1 = torch.stack([weights.gate_up_of(e) for e in range(E)]).double()
    W2 = torch.stack([weights.down_of(e) for e in range(E)]).double()

    def by_expert(rows, matrices):
        return torch.cat([rows[experts == e].double() @ matrices[e] for e in range(E)])

    activated, h = gate_up_fp8(
        quantize_rows(x),
        fp8_experts.gate_up_codes(weights),
        order,
        K,
        I,
        dtype,
        tiles.gate_up,
        activation="silu",
        keep_preactivation=True,
    )
    assert relative(h[:used], by_expert(fp8.rounded_rows(x)[tokens], W1.mT)) <= PRODUCT_TOLERANCE
    a = Epilogue().apply(h[:used].float())
    codes = fp8.dequantize(activated[0][:used], activated[1][:used], (1, 128))[:, :I]
    assert decibels(codes, a) >= 28 and not activated[0][:used, I:].view(torch.uint8).any()
    y = grouped_gemm_fp8(activated, fp8_experts.down_codes(weights), order, H, dtype, tiles.down)
    assert relative(y[:used], by_expert(codes, W2.mT)) <= PRODUCT_TOLERANCE
    turned = fp8_experts.down_codes(weights, transpose=True)
    grad = torch.randn_like(x)
    grad_h, scaled, partial = down_backward_fp8(
        quantize_rows(grad), turned, h, shares, order, "silu", tiles.down_backward
    )
    grad_a, weight = by_expert(fp8.rounded_rows(grad)[tokens], W2), shares.flatten()[slots].unsqueeze(1)
    wide = h[:used].double().requires_grad_()
    (wanted,) = torch.autograd.grad(Epilogue().apply(wide), wide, grad_a * weight)
    assert relative(grad_h[:used], wanted) <= PRODUCT_TOLERANCE
    assert relative(scaled[:used], a.double() * weight) <= PRODUCT_TOLERANCE
    assert relative(partial[:used], (grad_a * a).sum(1)) <= 1e-3
    halves = quantize_halves(grad_h, order.expert_start[-1:])
    rows_of_dx = grouped_gemm_fp8(
        halves, fp8_experts.gate_up_codes(weights, transpose=True), order, H, dtype, tiles.input_gradient
    )
    rounded = torch.cat([fp8.rounded_rows(half) for half in grad_h[:used].chunk(2, dim=1)], dim=1)
    assert relative(rows_of_dx[:used], by_expert(rounded, W1)) <= PRODUCT_TOLERANCE


@pytest.mark.parametrize(
    "pattern", ["some_unused", "empty_experts", "one_expert", "all_unused", "skewed", "every_expert"]
)
@pytest.mark.parametrize("rows", [12, 40, 1000])
def test_patterns(rows, pattern, guarded_buffers):
    assert_tiles_equal_witness(lambda: case_of(rows, pattern=pattern))


@pytest.mark.parametrize("rows,H,I", [(40, 520, 264), (130, 520, 264), (130, 511, 257), (130, 128, 1), (40, 1, 128)])
def test_neighbors_of_the_tile(rows, H, I, guarded_buffers):  # noqa: E741
    assert_tiles_equal_witness(lambda: case_of(rows, H, I))


def test_fp16(guarded_buffers):
    assert_tiles_equal_witness(lambda: case_of(dtype=torch.float16), torch.float16)


@pytest.mark.parametrize("is_descriptor", [True, False])
def test_weights_by_descriptor_and_by_pointer(is_descriptor, monkeypatch, guarded_buffers):
    if is_descriptor and not runs_descriptors():
        pytest.skip("there is no copy engine before sm_90")
    original = fp8_experts.choose_fp8_tiles

    def choose(*arguments):
        tiles = original(*arguments)
        fields = dataclasses.fields(tiles)
        return dataclasses.replace(
            tiles,
            **{f.name: dataclasses.replace(getattr(tiles, f.name), uses_descriptor=is_descriptor) for f in fields},
        )

    monkeypatch.setattr(fp8_experts, "choose_fp8_tiles", choose)
    for rows in (40, 300):
        assert_tiles_equal_witness(lambda rows=rows: case_of(rows, 520, 264))


def test_a_clamped_epilogue(guarded_buffers):
    assert_tiles_equal_witness(lambda: case_of(300), activation=Epilogue(limit=0.7, alpha=1.702, shift=1.0))


@pytest.mark.parametrize("H", [512, 520])
def test_codes_of_a_checkpoint(H, guarded_buffers):
    gate_up, down, scales = codes_of(case_of(H=H))
    scales["down_scales"] = scales["down_scales"] * 1.3

    def make():
        case = case_of(H=H)
        return [case[0], gate_up, down, *case[3:]]

    def run(*operands, **settings):
        return fused_moe_fp8(*operands, **scales, **settings)

    got, wanted = gradients(run, make()), witness(make(), run)
    errors = {NAMES[i]: largest_tile_error(got[i], wanted[i]) for i in (0, 1, 4)}
    assert all(error <= TOLERANCE[torch.bfloat16] for error in errors.values()), errors


def test_accuracy_of_the_whole_layer():
    """Against float32 without FP8 at fixed routing: one product is at 28.5 dB, two in turn at less."""
    case = case_of(300, 2048, 768)
    got = gradients(fused_moe_fp8, case)
    grad = torch.randn(got[0].shape, generator=torch.Generator().manual_seed(1)).to(got[0])
    wanted = expert_loop(*(t.detach() for t in case), grad_output=grad)
    found = {name: decibels(*pair) for name, *pair in zip(NAMES, got, wanted, strict=True)}
    assert found["output"] >= 23 and found["hidden_states"] >= 23, found
    assert found["gate_up_proj"] >= 24 and found["down_proj"] >= 24, found


@pytest.mark.parametrize("T", [1, 5, 100, 1500])
def test_the_forward_pass_is_the_same_with_gradients_and_without(T):
    case = make_layer(T, 512, 256, 8, 3, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        alone = fused_moe_fp8(*case)
    assert torch.equal(fused_moe_fp8(*case).detach(), alone)


@pytest.mark.parametrize("is_disturbed", [False, True])
def test_twenty_runs_are_bit_equal(is_disturbed):
    """Also while another stream keeps the multiprocessors and the caches busy."""
    first, other, stream = None, torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    case = case_of(1500, 1024, 768, 8, 3)
    for _ in range(20):
        if is_disturbed:
            with torch.cuda.stream(stream):
                torch.mm(other, other)
        for i in LEAVES:
            case[i].grad = None
        results = gradients(fused_moe_fp8, case)
        first = first or [t.clone() for t in results]
        assert all(torch.equal(one, wanted) for one, wanted in zip(results, first, strict=True))
    torch.cuda.synchronize()


def test_a_training_step_in_a_cuda_graph_never_waits_for_the_host():
    case, fresh = case_of(), case_of(seed=1)
    leaves, grad = [case[i] for i in LEAVES], torch.randn_like(case[0])

    def step():
        output = fused_moe_fp8(*case)
        return output, *torch.autograd.grad(output, leaves, grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor, other in zip(case, fresh, strict=True):
            tensor.copy_(other)
    graph.replay()
    wanted = step()
    assert all(torch.equal(one, other) for one, other in zip(captured, wanted, strict=True))


@pytest.mark.xdist_group("large")
def test_more_elements_than_fit_32_bits():
    """h of more than 2^31 elements: the last tokens come out as they do alone."""
    T, H, I, E, K, last = 66000, 128, 2048, 8, 8, 1024  # noqa: E741
    case = make_layer(T, H, I, E, K, dtype=torch.bfloat16, unused=0.0, device="cuda")
    grad = torch.randn_like(case[0])
    assert T * K * 2 * I > 2**31
    few = [t.detach()[-last:].requires_grad_() for t in (case[0], case[4])]
    whole = fused_moe_fp8(*case)
    alone = fused_moe_fp8(few[0], case[1], case[2], case[3][-last:], few[1])
    assert torch.equal(whole[-last:], alone)
    grads = torch.autograd.grad(whole, (case[0], case[4]), grad)
    for one, other in zip(grads, torch.autograd.grad(alone, few, grad[-last:]), strict=True):
        assert torch.equal(one[-last:], other)


def test_no_tokens():
    output, *grads = gradients(fused_moe_fp8, make_layer(0, 512, 256, 8, 3, dtype=torch.bfloat16, device="cuda"))
    assert output.shape == (0, 512) and not any(grad.any() for grad in grads)


def test_float32_weights_are_refused():
    with pytest.raises(ValueError, match="on cuda with float32 weights, expected bfloat16; use fused_moe"):
        fused_moe_fp8(*make_layer(4, 128, 128, device="cuda"))


def test_a_model_of_transformers_trains():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("modeling_deepseek")
    config = transformers.Qwen3MoeConfig(
        vocab_size=61,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=128,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="fused_moe_fp8")
    model = model.to("cuda", torch.bfloat16)
    ids = torch.randint(0, 61, (4, 64), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
