"""LoRA inside the Triton path on a GPU, with its own tiles at sizes where every loop is in full swing."""

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from lora_cases import DOWN, GATE_UP, leaves_of, loop_reference, make_lora_case, names_of, run, step

from deepseek_kernels.expert_loop import TILE_TOLERANCE, largest_tile_error

pytestmark = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def case_of(dtype=BF16, *, T=1500, H=512, I=256, E=8, K=3, r=16, **settings):  # noqa: E741
    return make_lora_case(dtype, T=T, H=H, I=I, E=E, K=K, r=r, device="cuda", **settings)


def assert_tiles_right(case):
    """Every 128 x 128 block of output and gradients, against the loop over experts with folded weights in float64."""
    pairs = zip(names_of(case), step(case), loop_reference(case), strict=True)
    errors = {name: largest_tile_error(*(_matrices(name, t, case) for t in pair)) for name, *pair in pairs}
    assert all(error <= TILE_TOLERANCE[case["x"].dtype] for error in errors.values()), errors


def _matrices(name, tensor, case):
    """B's gradient expert by expert: in PEFT's order a block holds a little of every expert."""
    if not name.endswith("_b"):
        return tensor
    return tensor.view(tensor.shape[0], -1, case["gate_up_proj"].shape[0]).permute(2, 0, 1)


# The tile's multiple, and neighbors that load in other widths: by 8, and by 1.
@pytest.mark.parametrize(
    "dtype,H,I,r",
    [
        (BF16, 512, 256, 16),
        (BF16, 520, 264, 8),
        (BF16, 511, 257, 64),
        (BF16, 512, 256, 1),
        (BF16, 512, 256, 96),
        (FP16, 520, 264, 16),
        (FP32, 512, 256, 16),
        (FP32, 511, 257, 1),
    ],
)
def test_every_tile(dtype, H, I, r):  # noqa: E741
    assert_tiles_right(case_of(dtype, H=H, I=I, r=r))


@pytest.mark.parametrize("pattern", ["any", "empty_experts", "one_expert", "skewed", "all_unused"])
def test_routing_patterns(pattern):
    assert_tiles_right(case_of(pattern=pattern))


@pytest.mark.parametrize("T", [1, 4, 30, 150])
def test_few_rows(T):
    """The tiles of 16 and of 64 rows; up to four tokens, which take another path without an adapter."""
    assert_tiles_right(case_of(T=T, pattern="any"))


@pytest.mark.parametrize("which", [GATE_UP, DOWN], ids="-".join)
def test_one_projection(which):
    assert_tiles_right(case_of(which=which))


def test_wide_factors_over_narrow_weights():
    """As PEFT keeps them by default; their gradients are not rounded to bf16."""
    case = case_of(factor_dtype=FP32)
    assert_tiles_right(case)
    gradient = step(case)[3]
    assert gradient.dtype == FP32 and not torch.equal(gradient, gradient.bfloat16().float())


@pytest.mark.parametrize("is_disturbed", [False, True])
def test_twenty_runs_are_bit_equal(is_disturbed):
    """Also while another stream keeps the multiprocessors and the caches busy."""
    case, first = case_of(T=6000, H=1024, I=768), None
    other, stream = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    for _ in range(20):
        if is_disturbed:
            with torch.cuda.stream(stream):
                torch.mm(other, other)
        results = step(case)
        first = first or results
        assert all(torch.equal(one, wanted) for one, wanted in zip(results, first, strict=True))
    torch.cuda.synchronize()


@pytest.mark.parametrize("T", [1, 4, 100, 1500])
def test_the_forward_pass_is_the_same_without_gradients(T):
    case = case_of(T=T)
    with torch.no_grad():
        alone = run(case)
    assert torch.equal(run(case).detach(), alone)


def test_nothing_waits_for_the_device():
    case = case_of()
    step(case)  # compiles
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(case)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_a_training_step_in_a_cuda_graph():
    case, fresh = case_of(), case_of(seed=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(case)
    with torch.no_grad():
        for tensor, other in zip(leaves_of(case), leaves_of(fresh), strict=True):
            tensor.copy_(other)
        for name in ("ids", "grad", "gate_up_proj", "down_proj"):
            case[name].copy_(fresh[name])
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(captured, step(case), strict=True))


def test_no_tokens():
    output, grad_x, _, *of_factors = step(case_of(T=0))
    assert output.shape == grad_x.shape == (0, 512) and not any(one.any() for one in of_factors)


def test_inductor():
    case = case_of()
    compiled = torch.compile(run, fullgraph=True)
    output = compiled(case)
    got = [output.detach(), *torch.autograd.grad(output, leaves_of(case), case["grad"])]
    for one, other in zip(got, step(case), strict=True):
        assert largest_tile_error(one, other) < 1e-2


def test_peak_memory_stays_below_one_matrix_stack():
    """Neither a merged copy nor a gradient of the weights' size: 64 first projections of 512 x 512 are 32 MiB."""
    case = case_of(T=300, E=64)
    step(case)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(case)
    torch.cuda.synchronize()
    stack = case["gate_up_proj"].nbytes
    assert torch.cuda.max_memory_allocated() - before < stack


def test_a_model_under_peft_is_not_folded(monkeypatch):
    """The whole way: PEFT's wrapper hands its factors over, and loss and gradients are those of its fold."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("modeling_deepseek.expert_adapters")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=6,
        num_experts_per_tok=2,
    )
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="fused_moe").cuda()
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=targets)
    model = peft.get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(0, 64, (2, 19), device="cuda")

    def gradients(implementation):
        model.base_model.model.set_experts_implementation(implementation)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = gradients("eager")
    monkeypatch.setattr(torch.nn.utils.parametrize, "register_parametrization", None)
    found = gradients("fused_moe")
    assert len(found) == len(expected) == 1 + 2 * 4
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
