import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from deepseek_serving.hf_export import export_deepseek_v3
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stock_transformers_loads_it_with_equal_logits(tiny, input_ids, tmp_path, dtype):
    torch.manual_seed(0)
    model = DeepseekForCausalLM(DeepseekConfig(**tiny, hidden_dropout=0.1)).eval()
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.normal_(0, 0.1)
    model.to(dtype).save_pretrained(tmp_path / "ours")
    # Not compared with `model` itself: .to(bfloat16) rounds transformers' rotary frequencies, which loading does not.
    model = DeepseekForCausalLM.from_pretrained(tmp_path / "ours")
    export_deepseek_v3(model, tmp_path / "stock")
    assert not list((tmp_path / "stock").glob("*.py")), "none of our code"
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert type(loaded) is DeepseekV3ForCausalLM and not any(info.values())
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    ours, stock = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "stock"))
    assert ours.keys() == stock.keys() and all(torch.equal(ours[name], stock[name]) for name in ours)


def test_vllm_and_sglang_find_what_they_read(tiny, input_ids, tmp_path):
    """Their loaders (vLLM 002d6073, SGLang 00114aef): `topk_method` decides whether there is a balancing bias, vLLM's
    `scoring_func` is softmax unless told, and both have a head of their own even where ours is tied.
    """
    model = DeepseekForCausalLM(DeepseekConfig(**tiny, tie_word_embeddings=True)).eval()
    export_deepseek_v3(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["topk_method"] == "noaux_tc" and config["scoring_func"] == "sigmoid"
    assert config["tie_word_embeddings"] is False
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids).logits, model(input_ids).logits)


def test_a_model_outside_v3s_range_is_refused_by_name(tiny, tmp_path):
    config = DeepseekConfig(
        **tiny, scoring_func="softmax", min_experts_per_tok=1, router_key_dim=6, norm_type="layernorm"
    )
    with pytest.raises(ValueError) as caught:
        export_deepseek_v3(DeepseekForCausalLM(config), tmp_path / "stock")
    for name in ("scoring_func='softmax'", "min_experts_per_tok=1", "router_key_dim=6", "norm_type='layernorm'"):
        assert name in str(caught.value)
    assert not (tmp_path / "stock").exists()


def test_an_occupied_folder_is_left_alone(tiny, tmp_path):
    (tmp_path / "stock").mkdir()
    (tmp_path / "stock" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="expected an empty or absent folder"):
        export_deepseek_v3(DeepseekForCausalLM(DeepseekConfig(**tiny)), tmp_path / "stock")


def test_another_model_is_refused(stock, tmp_path):
    with pytest.raises(
        ValueError,
        match="model_type: got 'deepseek_v3', expected deepseek_moe; transformers loads deepseek_v3 as it is",
    ):
        export_deepseek_v3(stock, tmp_path / "stock")
