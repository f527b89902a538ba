"""Every setting that is read changes something or is refused: the model's, the callback's and the recipes'."""

import ast
import dataclasses
import functools
import importlib
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

import deepseek_cli
import deepseek_training
from deepseek_training.balance import ExpertBalanceCallback
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

ROOT = Path(deepseek_training.__file__).parent
# For each added setting another value, and what it needs beside it.
MODEL = {
    "scoring_func": {"scoring_func": "softmax"},
    "topk_method": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "min_experts_per_tok": {"min_experts_per_tok": 3, "target_experts_per_tok": None},
    "expert_top_p": {"expert_top_p": 0.1, "target_experts_per_tok": None},
    "target_experts_per_tok": {"target_experts_per_tok": 3.0},
    "router_key_dim": {"router_key_dim": 8},
    "router_bias_update_speed": {"router_bias_update_speed": 0.3},
    "seq_aux_loss_coef": {"seq_aux_loss_coef": 1.0},
    "router_z_loss_coef": {"router_z_loss_coef": 1.0},
    "router_aux_loss_coef": {"router_aux_loss_coef": 1.0, "output_router_logits": True},
    "mtp_loss_coef": {"mtp_loss_coef": 1.0, "num_nextn_predict_layers": 1},
    "norm_type": {"norm_type": "layernorm"},
    "hidden_dropout": {"hidden_dropout": 0.5},
}
# What a setting is compared with, where it is not the preset itself.
BESIDE = {
    "topk_method": {"n_group": 4, "topk_group": 2},
    "mtp_loss_coef": {"num_nextn_predict_layers": 1},
    "router_aux_loss_coef": {"output_router_logits": True},
}


def train_two_steps(**settings):
    """Weights and biases of all that the model without added layers has, after two steps with the callback."""
    base = {"router_bias_update_speed": 0.0, "min_experts_per_tok": 1, "target_experts_per_tok": 2.0, **settings}
    torch.manual_seed(0)
    model = DeepseekForCausalLM(DeepseekConfig.from_preset("debug", **base))
    shared = DeepseekForCausalLM(DeepseekConfig.from_preset("debug")).state_dict()
    torch.manual_seed(1)
    with torch.no_grad():  # equal first weights, whatever a setting adds
        for name, value in model.state_dict().items():
            if name in shared and value.is_floating_point() and value.dim() > 1:
                value.copy_(torch.randn(value.shape) * 0.05)
    model.train()
    callback, optimizer = ExpertBalanceCallback(), torch.optim.SGD(model.parameters(), 1.0)
    callback.begin(model)
    for seed in range(2):
        ids = torch.randint(3, 512, (2, 16), generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        options = {"output_router_logits": True} if settings.get("output_router_logits") else {}
        model(input_ids=ids, labels=ids, **options).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        callback.finish_step()
    callback.end(model)
    return {name: value for name, value in model.state_dict().items() if name in shared}


def test_the_sweep_knows_every_added_setting():
    added = {name for name in DeepseekConfig.__annotations__ if name not in ("model_type", "attribute_map")}
    assert set(MODEL) == added


@pytest.mark.parametrize("name", MODEL)
def test_each_setting_of_the_model_changes_its_training(name):
    before, after = train_two_steps(**BESIDE.get(name, {})), train_two_steps(**MODEL[name])
    common = before.keys() & after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in common) or before.keys() != after.keys()


def stock_v3():
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": None, "kv_lora_rank": 16}
    widths = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4}
    more = {
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
    }
    return DeepseekV3ForCausalLM(DeepseekV3Config(**small, **heads, **widths, **more))


def dense():
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))


def ours():
    return DeepseekForCausalLM(DeepseekConfig.from_preset("debug", vocab_size=64, router_bias_update_speed=0.0))


@pytest.mark.parametrize("make", [ours, stock_v3, dense])
@pytest.mark.parametrize("name", ["bias_update_speed", "seq_aux_loss_coef", "router_z_loss_coef"])
def test_each_setting_of_the_callback_acts_or_is_refused(make, name):
    def train(**settings):
        torch.manual_seed(0)
        model = make().train()
        callback = ExpertBalanceCallback(**settings)
        callback.begin(model)
        ids = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))
        model(input_ids=ids, labels=ids).loss.backward()
        torch.optim.SGD(model.parameters(), 1.0).step()
        callback.finish_step()
        callback.end(model)
        return model.state_dict()

    try:
        changed = train(**{name: 0.3})
    except ValueError as error:
        assert name in str(error) and "\n" not in str(error)
        return
    plain = train()
    assert any(not torch.equal(value, plain[key]) for key, value in changed.items())


def recipe_classes():
    found = {}
    for path in sorted((ROOT / "recipes").glob("*.py")):
        module = importlib.import_module(f"deepseek_training.recipes.{path.stem}")
        for name, value in vars(module).items():
            if isinstance(value, type) and dataclasses.is_dataclass(value) and name.endswith("Recipe"):
                found[name] = value
    return found


@functools.cache
def attributes_read():
    """Every name that is read as an attribute outside of the recipes' own folder, by training or a command."""
    commands = Path(deepseek_cli.__file__).parent
    paths = [path for folder in (ROOT, commands) for path in folder.rglob("*.py") if path.parent.name != "recipes"]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("name", recipe_classes())
def test_each_setting_of_a_recipe_is_read(name):
    unread = {field.name for field in dataclasses.fields(recipe_classes()[name])} - attributes_read()
    assert not unread
