"""Adapters of fused experts as 2-D LoRA of single experts: the same function, and back bit for bit."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import modeling_deepseek  # noqa: F401  (importing it registers fused_moe)
from deepseek_serving.expert_adapter import CONFIG, WEIGHTS, join_experts, split_experts

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.arange(3, 25).view(2, 11)


def build():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 4}
    routed = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "head_dim": 8}
    config = Qwen3MoeConfig(vocab_size=61, num_hidden_layers=2, **sizes, **routed)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="fused_moe").eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def adapter(tmp_path):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=EXPERTS)
    model = get_peft_model(build(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_single_experts_compute_what_the_fused_ones_do(adapter, tmp_path):
    """The two-dimensional pairs, added by hand to each expert's matrices."""
    expected = logits(PeftModel.from_pretrained(build(), adapter))
    tensors = load_file(split_experts(adapter, tmp_path / "single") / WEIGHTS)
    model, prefix = build(), "base_model.model."
    for number, layer in enumerate(model.model.layers):
        attention = f"{prefix}model.layers.{number}.self_attn.q_proj"
        layer.self_attn.q_proj.weight.data += (
            2 * tensors[f"{attention}.lora_B.weight"] @ tensors[f"{attention}.lora_A.weight"]
        )
        for expert in range(6):
            name = f"{prefix}model.layers.{number}.mlp.experts.{expert}"
            gate, up, down = (
                2 * tensors[f"{name}.{part}.lora_B.weight"] @ tensors[f"{name}.{part}.lora_A.weight"]
                for part in ("gate_proj", "up_proj", "down_proj")
            )
            layer.mlp.experts.gate_up_proj.data[expert] += torch.cat([gate, up])
            layer.mlp.experts.down_proj.data[expert] += down
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "single" / CONFIG).read_text())
    assert config["target_parameters"] is None
    assert config["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj"]


def test_there_and_back_is_bit_equal(adapter, tmp_path):
    joined = join_experts(split_experts(adapter, tmp_path / "single"), tmp_path / "joined")
    before, after = load_file(adapter / WEIGHTS), load_file(joined / WEIGHTS)
    assert before.keys() == after.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(
        logits(PeftModel.from_pretrained(build(), joined)), logits(PeftModel.from_pretrained(build(), adapter))
    )


def test_gate_and_up_with_factors_of_their_own(adapter, tmp_path):
    single = split_experts(adapter, tmp_path / "single")
    tensors = load_file(single / WEIGHTS)
    for key in [key for key in tensors if ".up_proj.lora_A" in key]:
        tensors[key] = torch.randn_like(tensors[key]) * 0.1
    save_file(tensors, single / WEIGHTS)
    joined = join_experts(single, tmp_path / "joined")
    config = json.loads((joined / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    fused, name = load_file(joined / WEIGHTS), "base_model.model.model.layers.1.mlp.experts"
    a = fused[f"{name}.base_layer.lora_A.weight"].view(6, 8, -1)[3]
    b = fused[f"{name}.base_layer.lora_B.weight"].view(-1, 8, 6)[:, :, 3]
    for part, rows in (("gate_proj", slice(0, 20)), ("up_proj", slice(20, 40))):
        expected = tensors[f"{name}.3.{part}.lora_B.weight"] @ tensors[f"{name}.3.{part}.lora_A.weight"]
        torch.testing.assert_close(b[rows] @ a, expected)


def test_bad_input_is_one_line(adapter, tmp_path):
    single = split_experts(adapter, tmp_path / "single")
    with pytest.raises(ValueError, match="without fused experts"):
        split_experts(single, tmp_path / "no")
    with pytest.raises(ValueError, match="without single experts"):
        join_experts(adapter, tmp_path / "no")
    with pytest.raises(FileExistsError, match="expected an empty or absent folder"):
        split_experts(adapter, single)
    with pytest.raises(FileNotFoundError, match="expected a folder with"):
        split_experts(tmp_path / "absent", tmp_path / "no")
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, "r": 0}))
    with pytest.raises(ValueError, match="r: got 0, expected a rank that divides the 24 rows"):
        split_experts(adapter, tmp_path / "no")
    assert not (tmp_path / "no").exists()
