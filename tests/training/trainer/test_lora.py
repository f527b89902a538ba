"""LoRA by PEFT on attention and on the experts' 3-D parameters: training, merging, saving, loading elsewhere."""

import subprocess
import sys

import pytest
import torch
from moe_routers import find_routers
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import use_experts_implementation

from deepseek_records.activation_checkpointing import enable_checkpointing
from deepseek_training.balance.callback import ExpertBalanceCallback
from deepseek_training.trainer.lora import adapted_names
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
ROUTER_STATE = ("e_score_correction_bias", "share.state")


def rows(seed=0):
    return torch.randint(3, 61, (8, 12), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def base_path(tmp_path):
    """A saved model with a bias that matters and a number of experts that varies by token."""
    torch.manual_seed(0)
    config = DeepseekConfig.from_preset("debug", vocab_size=61, router_bias_update_speed=0.01)
    model = DeepseekForCausalLM(config)
    for router in find_routers(model):
        torch.nn.init.normal_(router.weight, std=0.3)
        torch.nn.init.normal_(router.e_score_correction_bias, std=0.02)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(base_path, **settings):
    return DeepseekForCausalLM.from_pretrained(base_path, **settings).eval()


def adapt(model, seed=1, **settings):
    """The model with an adapter whose every factor is random, so that it changes the output from the start.

    Without `task_type`, AutoPeftModel would want to import the class from our package.
    """
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "target_parameters": EXPERTS, **settings}
    adapted = get_peft_model(model, LoraConfig(lora_dropout=0.0, task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return adapted.eval()


def train(model, folder, callback, **arguments):
    data = [{"input_ids": row, "labels": row} for row in rows()]
    options = {"max_steps": 3, "learning_rate": 0.02, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    arguments = TrainingArguments(folder, logging_steps=1, save_strategy="no", **{**options, **arguments})
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=rows(seed=5), use_cache=False).logits


def test_only_the_adapter_trains_and_the_experts_are_balanced(base_path, tmp_path):
    before, callback = load(base_path).state_dict(), ExpertBalanceCallback(bias_update_speed=0.01)
    model = get_peft_model(
        load(base_path), LoraConfig(r=4, target_modules=ATTENTION, target_parameters=EXPERTS, lora_dropout=0.0)
    )
    train(model, tmp_path / "run", callback)
    changed = {name for name, value in model.named_parameters() if "lora_B" in name and value.any()}
    assert any("experts" in name for name in changed) and any("kv_b_proj" in name for name in changed)
    assert len(changed) == sum("lora_B" in name for name, _ in model.named_parameters())
    assert callback.history[-1].figures["load_imbalance"] >= 1 and len(callback.tokens_per_expert) == 2
    after = model.unload().state_dict()
    for name, value in before.items():
        # The routers' state moves with every optimizer step, for the callback was asked to move it.
        assert torch.equal(after[name], value) != name.endswith(ROUTER_STATE), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_and_unloading(base_path, dtype):
    plain = load(base_path, dtype=dtype)
    before, expected = plain.state_dict(), logits(plain)
    model = adapt(load(base_path, dtype=dtype))
    adapted = logits(model)
    effect = (adapted - expected).float().norm()
    assert effect > 0.1 * expected.float().norm(), "the adapter does something"
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    merged = adapt(load(base_path, dtype=dtype)).merge_and_unload()
    assert type(merged) is DeepseekForCausalLM and merged.state_dict().keys() == before.keys()
    # bf16 keeps 8 bits: a merged weight is rounded where the adapter's branch is added in full, and a token on the
    # edge between two experts may change sides.
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert (logits(merged) - adapted).float().norm() < tolerance * effect
    for router in find_routers(merged):
        assert router.e_score_correction_bias.dtype == torch.float32
    unloaded = model.unload()
    assert type(unloaded) is DeepseekForCausalLM
    assert all(torch.equal(value, before[name]) for name, value in unloaded.state_dict().items())


def test_unmerging_restores_the_base_within_rounding(base_path):
    model = adapt(load(base_path))
    adapted = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=1e-5)


def test_a_merged_model_is_saved_with_the_official_names(base_path, tmp_path):
    merged = adapt(load(base_path)).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert names == load_file(base_path / "model.safetensors").keys()
    assert "model.layers.1.mlp.experts.0.gate_proj.weight" in names
    assert torch.equal(logits(load(tmp_path / "merged")), logits(merged))


@pytest.mark.parametrize("other", ["fused_moe", "grouped_mm"])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_experts_implementations_agree_under_lora(base_path, other, is_checkpointed):
    """Logits and the adapter's gradients; checkpointing runs PEFT's swapped parameters a second time."""
    found = []
    for implementation in ("eager", other):
        model = adapt(load(base_path, experts_implementation=implementation)).train()
        if is_checkpointed and implementation == other:
            model.enable_input_require_grads()
            enable_checkpointing(model, {"use_reentrant": False})
        output = model(input_ids=rows(), labels=rows())
        output.loss.backward()
        gradients = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
        assert all("lora_" in name for name in gradients)
        found.append((output.logits.detach(), gradients))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    for name, gradient in found[0][1].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-3, atol=1e-6)


CLEAN_PROCESS = """
import sys
for name in ("modeling_deepseek", "deepseek_kernels", "deepseek_training", "deepseek_model_cards"):
    sys.modules[name] = None  # Importing it now fails.
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert type(model.base_model.model).__module__.startswith("transformers_modules."), type(model.base_model.model)
with torch.no_grad():
    logits = model(input_ids=torch.load(sys.argv[2]), use_cache=False).logits
torch.save(logits, sys.argv[3])
"""


@pytest.mark.slow
def test_a_saved_adapter_loads_in_a_process_without_our_packages(base_path, tmp_path):
    model = adapt(load(base_path))
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))
    torch.save(rows(seed=5), tmp_path / "input_ids.pt")
    arguments = [tmp_path / "adapter", tmp_path / "input_ids.pt", tmp_path / "logits.pt"]
    done = subprocess.run(
        [sys.executable, "-c", CLEAN_PROCESS, *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model), rtol=0, atol=1e-5)


def test_router_state_travels_with_the_adapter_if_the_router_is_saved(base_path, tmp_path):
    """`modules_to_save` makes PEFT keep a second router beside the first; only the one that routes is balanced."""
    callback = ExpertBalanceCallback(bias_update_speed=0.01)
    model = adapt(load(base_path), modules_to_save=["gate"])
    assert len(find_routers(model)) == 2
    train(model, tmp_path / "run", callback)
    routers, plain = find_routers(model), find_routers(load(base_path))
    for router, untrained in zip(routers, plain, strict=True):
        moved = (router.e_score_correction_bias - untrained.e_score_correction_bias).abs().max()
        assert 0.005 < moved < 3 * 2 * 0.01, "three steps, each by the speed once"
        assert router.e_score_correction_bias.dtype == torch.float32
    assert callback.history[-1].figures["num_idle_experts"] < 8
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(base_path), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(model.merge_and_unload()), logits(again.merge_and_unload()))


def test_router_state_that_an_adapter_would_lose_is_named(base_path, tmp_path, caplog):
    train(adapt(load(base_path)), tmp_path / "run", ExpertBalanceCallback(bias_update_speed=0.01), max_steps=1)
    assert sum("modules_to_save=['gate']" in record.getMessage() for record in caplog.records) == 1


def test_preparing_a_quantized_model_leaves_the_bias_alone(base_path):
    """PEFT casts every half-precision parameter to fp32; the bias is a buffer, and fp32 already."""
    model = prepare_model_for_kbit_training(load(base_path, dtype=torch.bfloat16))
    for router, untouched in zip(find_routers(model), find_routers(load(base_path)), strict=True):
        assert torch.equal(router.e_score_correction_bias, untouched.e_score_correction_bias)


def test_scales_of_experts_loaded_in_fp8_are_no_targets():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "moe_intermediate_size": 16}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=61, num_experts=4, num_experts_per_tok=2, **sizes))
    experts_class = use_experts_implementation(
        experts_class=type("Loaded", (FP8Experts,), {}), experts_interface=ALL_FP8_EXPERTS_FUNCTIONS
    )
    model.model.layers[0].mlp.experts = experts_class(model.config, block_size=(128, 128))
    assert adapted_names(model)[1] == ["experts.down_proj", "experts.gate_up_proj"]
