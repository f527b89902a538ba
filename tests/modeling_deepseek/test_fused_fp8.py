"""`fused_moe_fp8` inside models: near to no FP8, trains, unused slots, and experts loaded in FP8."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import TINY
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import use_experts_implementation

import modeling_deepseek
from deepseek_kernels.fp8 import quantize_blocks
from deepseek_kernels.fused_moe_fp8 import fused_moe_fp8
from deepseek_kernels.lora import LoraFactors
from modeling_deepseek.fused_fp8 import fused_moe_fp8_codes_forward

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
}


def test_any_model_runs_near_its_own_forward_pass_and_trains():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SIZES), experts_implementation="fused_moe_fp8")
    ids = torch.randint(0, 61, (2, 9))
    logits = model(ids).logits
    model.set_experts_implementation("eager")
    wanted = model(ids).logits
    assert 0 < (logits - wanted).norm() <= 0.05 * wanted.norm()
    model.set_experts_implementation("fused_moe_fp8")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_unused_slots_are_named():
    """Our router gives an unused slot the index E where the experts take it."""
    dynamic = {"num_experts_per_tok": 4, "min_experts_per_tok": 1, "target_experts_per_tok": 2}
    model = modeling_deepseek.DeepseekForCausalLM(modeling_deepseek.DeepseekConfig(**{**TINY, **dynamic})).eval()
    model.set_experts_implementation("fused_moe_fp8")
    seen = []
    for layer in model.modules():
        if hasattr(layer, "gate_up_proj") and hasattr(layer, "is_concatenated"):
            layer.register_forward_pre_hook(
                lambda module, args: seen.append((args[1].max().item(), module.num_experts))
            )
    model(torch.randint(3, 60, (2, 16)))
    assert seen and all(largest == experts for largest, experts in seen)


class Config:
    """What ``FP8Experts`` asks for."""

    hidden_size, intermediate_size, moe_intermediate_size = 256, 128, 128
    num_local_experts = num_experts = 4
    hidden_act = "silu"
    _experts_implementation = "fused_moe_fp8"

    def get(self, name, default=None):
        return default


def loaded_experts(**settings):
    """An experts module as transformers loads one in FP8, and the weights it came from."""
    experts_class = use_experts_implementation(
        experts_class=type("Loaded", (FP8Experts,), {}), experts_interface=ALL_FP8_EXPERTS_FUNCTIONS
    )
    experts = experts_class(Config(), **{"block_size": (128, 128), **settings})
    generator = torch.Generator().manual_seed(0)
    weights = []
    for name in ("gate_up_proj", "down_proj"):
        codes, scales = getattr(experts, name), getattr(experts, f"{name}_scale_inv")
        weights.append(torch.randn(codes.shape, generator=generator) * 0.1)
        for expert, matrix in enumerate(weights[-1]):
            codes.data[expert], scales.data[expert] = quantize_blocks(matrix)
    return experts, weights


def test_experts_loaded_in_fp8_keep_their_codes():
    experts, (gate_up, down) = loaded_experts()
    x, weights = torch.randn(9, 256, requires_grad=True), torch.rand(9, 2, requires_grad=True)
    ids = torch.randint(0, 4, (9, 2))
    output = experts(x, ids, weights)  # by transformers' own dispatch
    assert torch.equal(output, fused_moe_fp8(x, gate_up, down, ids, weights))
    output.sum().backward()
    assert x.grad.any() and weights.grad.any()
    assert all(parameter.grad is None for parameter in experts.parameters())


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"activation_scheme": "static"}, "does not compute Loaded with activation_scheme=static"),
        ({"block_size": None}, "does not compute Loaded with block_size=None"),
    ],
)
def test_other_kinds_of_fp8_experts_are_refused(settings, message):
    experts, _ = loaded_experts()
    for name, value in settings.items():
        setattr(experts, name, value)
    with pytest.raises(ValueError, match=message):
        fused_moe_fp8_codes_forward(
            experts, torch.randn(2, 256), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
        )


def adapt(model, names=("experts.gate_up_proj", "experts.down_proj")):
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=list(names)))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return adapted


@pytest.fixture
def never_folds(monkeypatch):
    """Fails as soon as PEFT puts anything in the place of a weight."""

    def refuse(*args, **kwargs):
        raise AssertionError("a merged copy of the experts was built")

    monkeypatch.setattr(torch.nn.utils.parametrize, "register_parametrization", refuse)


@pytest.mark.usefixtures("never_folds")
def test_lora_is_handed_over_and_near_the_same_without_fp8():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SIZES), experts_implementation="fused_moe_fp8")
    plain = model(torch.arange(18).view(2, 9)).logits.detach()
    adapted, found = adapt(model), {}
    ids = torch.randint(0, 61, (2, 9))
    for name in ("fused_moe_fp8", "fused_moe"):
        adapted.base_model.model.set_experts_implementation(name)
        adapted.zero_grad()
        output = adapted(input_ids=ids, labels=ids)
        output.loss.backward()
        grads = {n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None}
        found[name] = {"logits": output.logits.detach()} | grads
    assert found["fused_moe"].keys() == found["fused_moe_fp8"].keys()
    assert len(found["fused_moe"]) == 1 + 2 * 2 * 2  # of two layers, two projections, two factors
    for name, wanted in found["fused_moe"].items():
        assert 0 < (found["fused_moe_fp8"][name] - wanted).norm() <= 0.15 * wanted.norm(), name
    with adapted.disable_adapter():
        adapted.base_model.model.set_experts_implementation("fused_moe_fp8")
        assert torch.equal(adapted(torch.arange(18).view(2, 9)).logits, plain)


class Layer(torch.nn.Module):
    """What PEFT needs around experts: a model with a configuration."""

    def __init__(self, experts):
        super().__init__()
        self.experts, self.config = experts, experts.config

    def forward(self, x, ids, weights):
        return self.experts(x, ids, weights)


@pytest.mark.usefixtures("never_folds")
@pytest.mark.parametrize("names", [("experts.gate_up_proj", "experts.down_proj"), ("experts.down_proj",)], ids=len)
def test_lora_over_experts_loaded_in_fp8_equals_the_operator(names):
    """PEFT's names of the factors and its order of B; the codes stay as they are."""
    experts, _ = loaded_experts()
    before = {name: parameter.detach().clone() for name, parameter in experts.named_parameters()}
    adapted = adapt(Layer(experts), names)
    x, weights = torch.randn(9, 256), torch.rand(9, 2)
    ids = torch.randint(0, 4, (9, 2))
    output = adapted(x, ids, weights)
    output.sum().backward()
    wrapped = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
    assert len(wrapped) == 2 * len(names)
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.any() for p in wrapped.values())
    pairs, wrapper = {}, adapted.base_model.model.experts
    while hasattr(wrapper, "parameter_name"):
        pair = (one["default"].weight.detach() for one in (wrapper.lora_A, wrapper.lora_B))
        pairs[wrapper.parameter_name.replace("_proj", "_lora")] = LoraFactors(*pair, 2.0)
        wrapper = wrapper.base_layer
    scales = {"gate_up_scales": experts.gate_up_proj_scale_inv, "down_scales": experts.down_proj_scale_inv}
    with torch.no_grad():
        wanted = fused_moe_fp8(x, experts.gate_up_proj, experts.down_proj, ids, weights, **scales, **pairs)
    assert len(pairs) == len(names) and torch.equal(output, wanted)
    for name, parameter in experts.named_parameters():
        assert torch.equal(parameter.view(torch.uint8), before[name].view(torch.uint8))


def test_what_peft_cannot_do_with_codes_is_refused(monkeypatch):
    """It would add the product to codes, as if their scales were one."""
    experts, _ = loaded_experts()
    adapted = adapt(Layer(experts))
    with pytest.raises(ValueError, match="merge: got experts as FP8 codes, expected ordinary weights"):
        adapted.merge_adapter()
    monkeypatch.setattr(Config, "_experts_implementation", "grouped_mm")
    with pytest.raises(ValueError, match="got grouped_mm for an adapter of Loaded, whose weights are FP8 codes"):
        adapted(torch.randn(9, 256), torch.zeros(9, 2, dtype=torch.long), torch.rand(9, 2))
