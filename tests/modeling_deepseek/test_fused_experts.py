"""`fused_moe` inside other people's models: seven MoE families, frozen experts, LoRA, and refusals by name."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    NemotronHConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)
from transformers.integrations.moe import _default_apply_gate
from transformers.models.aria.configuration_aria import AriaTextConfig
from transformers.models.aria.modeling_aria import AriaTextForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import modeling_deepseek.fused_experts as fused_experts
from deepseek_kernels.epilogue import Epilogue
from modeling_deepseek.experts_form import activation_name, find_epilogue

BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": None,
}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "n_shared_experts": 1}
GROUPS = {"n_group": 2, "topk_group": 2, "first_k_dense_replace": 1}
FAMILIES = {
    "mixtral": (MixtralConfig, {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "olmoe": (OlmoeConfig, {"num_experts": 7, "num_experts_per_tok": 3}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "head_dim": 8},
    ),
    "deepseek_v2": (DeepseekV2Config, {**ROUTED, **GROUPS, **MLA}),
    "deepseek_v3": (DeepseekV3Config, {**ROUTED, **GROUPS, **MLA}),
    "glm4_moe": (Glm4MoeConfig, {**ROUTED, **GROUPS, "head_dim": 8}),
    # Clamped where these inputs get to, biased, interleaved and transposed.
    "gpt_oss": (GptOssConfig, {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 8, "swiglu_limit": 0.8}),
}


def run(model, implementation, ids):
    model.set_experts_implementation(implementation)
    model.zero_grad()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    return output.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_to_eager(model, ids, tolerance=1e-6):
    """Logits and every gradient; fp32 sums of a few dozen products taken in another order."""
    logits, grads = run(model, "eager", ids)
    own_logits, own_grads = run(model, "fused_moe", ids)
    torch.testing.assert_close(own_logits, logits, rtol=1e-5, atol=tolerance)
    assert own_grads.keys() == grads.keys() and grads
    for name, grad in grads.items():
        torch.testing.assert_close(own_grads[name], grad, rtol=1e-4, atol=tolerance, msg=name)
    return grads


@pytest.fixture(params=FAMILIES)
def family(request):
    config_class, settings = FAMILIES[request.param]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**{**BASE, **settings}))
    # Initialisers leave weights at 0.02: products too small to tell a wrong kernel from rounding.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_logits_and_every_gradient_equal_eager(family):
    grads = assert_equal_to_eager(family, torch.randint(0, 61, (2, 9)), 2e-5)
    assert any("experts.gate_up_proj" in name for name in grads)


def test_a_saved_checkpoint_loads_with_the_implementation_by_name(tmp_path):
    config_class, settings = FAMILIES["qwen3_moe"]
    model = AutoModelForCausalLM.from_config(config_class(**{**BASE, **settings}))
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 61, (2, 9))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="fused_moe")
    assert loaded.config._experts_implementation == "fused_moe"
    model.set_experts_implementation("eager")
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_frozen_experts(family):
    for name, parameter in family.named_parameters():
        if ".experts." in name:
            parameter.requires_grad_(False)
    grads = assert_equal_to_eager(family, torch.randint(0, 61, (2, 9)), 2e-5)
    assert not any(".experts." in name for name in grads)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_lora_on_experts(name):
    config_class, settings = FAMILIES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**{**BASE, **settings}))
    lora = LoraConfig(
        r=4, target_modules=[], lora_dropout=0.0, target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    model = get_peft_model(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(0, 61, (2, 9))
    results = []
    for implementation in ("eager", "fused_moe"):
        model.base_model.model.set_experts_implementation(implementation)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), grads))
    (loss, grads), (own_loss, own_grads) = results
    torch.testing.assert_close(own_loss, loss)
    assert grads and all("lora" in name for name in grads) and grads.keys() == own_grads.keys()
    for parameter_name, grad in grads.items():
        torch.testing.assert_close(own_grads[parameter_name], grad, rtol=1e-4, atol=1e-6)


def test_bf16_stays_near_fp32():
    config_class, settings = FAMILIES["mixtral"]
    torch.manual_seed(0)
    wide = AutoModelForCausalLM.from_config(config_class(**{**BASE, **settings}), experts_implementation="fused_moe")
    narrow = copy.deepcopy(wide).bfloat16()
    ids = torch.randint(0, 61, (2, 9))
    torch.testing.assert_close(narrow(ids).logits.float(), wide(ids).logits, rtol=0.1, atol=0.02)


def test_transposed_weights_are_honoured():
    config = AriaTextConfig(**{**BASE, "moe_num_experts": 5, "moe_topk": 2, "moe_num_shared_experts": 1})
    torch.manual_seed(0)
    model = AriaTextForCausalLM(config)
    assert_equal_to_eager(model, torch.randint(0, 61, (2, 9)), 2e-5)


REFUSED = {
    "has_gate": (NemotronHExperts, NemotronHConfig, {"n_routed_experts": 4}, "has_gate=False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernel_does_not_compute_is_refused_by_name(name):
    experts_class, config_class, settings, reason = REFUSED[name]
    experts = experts_class(config_class(hidden_size=8, intermediate_size=8, **settings))
    with pytest.raises(ValueError, match=f"fused_moe does not compute {experts_class.__name__} with {reason}"):
        fused_experts.fused_moe_experts_forward(
            experts, torch.randn(2, 8), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
        )


class _Experts(torch.nn.Module):
    """The attributes transformers' decorator sets, with an activation or a gate of its own."""

    has_gate = is_concatenated = True
    has_bias = is_transposed = False

    def __init__(self, act_fn=torch.nn.functional.silu):
        super().__init__()
        self.has_gate, self.is_concatenated, self.has_bias, self.is_transposed = True, True, False, False
        self.act_fn = act_fn
        self.gate_up_proj = torch.nn.Parameter(torch.randn(2, 6, 4))
        self.down_proj = torch.nn.Parameter(torch.randn(2, 4, 3))

    _apply_gate = _default_apply_gate


class _ClampedExperts(_Experts):
    _apply_gate = DeepseekV4Experts._apply_gate


class _FloatGateExperts(_Experts):
    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return (self.act_fn(gate.float()) * up.float()).to(gate.dtype)


INPUTS = (torch.randn(3, 4), torch.tensor([[0], [1], [2]]), torch.ones(3, 1))


class _SoftcappedExperts(_Experts):
    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * 30 * torch.tanh(up / 30)


class _ClampedTwiceExperts(_ClampedExperts):
    """Cuts the gate off below as well."""

    def _apply_gate(self, gate_up):
        gate, up = gate_up.clamp(-self.limit, self.limit).chunk(2, dim=-1)
        return self.act_fn(gate) * up


@pytest.mark.parametrize("limit", [0.5, 7.0, 1000.0, 3e5])
def test_a_gate_of_its_own_is_found_by_what_it_computes(limit):
    experts = _ClampedExperts()
    experts.limit = limit
    assert find_epilogue(experts) == Epilogue(limit=limit)
    experts.limit = 2 * limit  # not remembered
    assert find_epilogue(experts) == Epilogue(limit=2 * limit)
    assert find_epilogue(_FloatGateExperts()) == Epilogue()


@pytest.mark.parametrize("experts_class", [_SoftcappedExperts, _ClampedTwiceExperts])
def test_another_gate_is_refused(experts_class):
    experts = experts_class()
    experts.limit = 7.0
    with pytest.raises(ValueError, match=f"{experts_class.__name__} with its own _apply_gate"):
        fused_experts.fused_moe_experts_forward(experts, *INPUTS)


@pytest.mark.parametrize(
    "flags,message",
    [
        ({"is_concatenated": False}, "is_concatenated=False and no _apply_gate of its own, which contradict"),
        ({"has_bias": True}, "has_bias=True and without gate_up_proj_bias and down_proj_bias"),
    ],
)
def test_flags_that_contradict_the_module(flags, message):
    experts = _Experts()
    for name, value in flags.items():
        setattr(experts, name, value)
    with pytest.raises(ValueError, match=message) as caught:
        fused_experts.fused_moe_experts_forward(experts, *INPUTS)
    assert "\n" not in str(caught.value)


def test_interleaved_weights_that_are_not_transposed():
    """GPT-OSS's are transposed, and sorted while they are copied."""

    class Interleaved(_ClampedExperts):
        def _apply_gate(self, gate_up):
            gate, up = gate_up[..., 0::2].clamp(max=self.limit), gate_up[..., 1::2].clamp(-self.limit, self.limit)
            return self.act_fn(gate) * up

    experts = Interleaved()
    experts.is_concatenated, experts.limit = False, 0.5
    output = fused_experts.fused_moe_experts_forward(experts, *INPUTS)
    x, ids, _ = INPUTS
    for token in range(2):
        h = experts.gate_up_proj[ids[token, 0]] @ x[token]
        torch.testing.assert_close(output[token], experts.down_proj[ids[token, 0]] @ experts._apply_gate(h))


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="does not compute the activation ReLU of _Experts"):
        fused_experts.fused_moe_experts_forward(_Experts(torch.nn.ReLU()), *INPUTS)


@pytest.mark.parametrize(
    "act_fn,wanted",
    [
        (torch.nn.SiLU(), "silu"),
        (torch.nn.GELU(), "gelu"),
        (torch.nn.GELU(approximate="tanh"), "gelu_pytorch_tanh"),
        (torch.nn.functional.gelu, "gelu"),
    ],
)
def test_activations_are_recognised(act_fn, wanted):
    assert activation_name(_Experts(act_fn)) == wanted
