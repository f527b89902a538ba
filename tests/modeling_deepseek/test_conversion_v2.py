"""DeepSeek-V2 checkpoints: transformers' own DeepseekV2ForCausalLM is the witness."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV2ForCausalLM

from deepseek_serving.gguf_export import obstacles_to_gguf
from deepseek_serving.hf_export import export_deepseek_v2, export_deepseek_v3
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM
from modeling_deepseek.routing import DeepseekRouter

GROUPED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}
# Greedy ignores groups, whatever the settings say; V2-Lite has no query latent.
LITE = {"topk_method": "greedy", "n_group": 2, "topk_group": 1, "q_lora_rank": None}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32, "beta_slow": 1, "mscale": 0.7,
    "mscale_all_dim": 0.9, "original_max_position_embeddings": 32,
}  # fmt: skip
CASES = {
    "grouped": GROUPED,
    "lite": LITE,
    "grouped-lite": {**GROUPED, "q_lora_rank": None},
    "greedy-latent": {**LITE, "q_lora_rank": 12},
    "groups-of-one": {**GROUPED, "n_group": 8, "topk_group": 5},
    "yarn": {**GROUPED, "rope_parameters": YARN},
}


def stock_v2(tiny, **settings):
    torch.manual_seed(0)
    names = DeepseekV2Config().to_dict()
    shared = {key: value for key, value in tiny.items() if key in names}
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**{**shared, **settings})).eval()
    for layer in model.model.layers[1:]:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.5)
    return model


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_logits_and_gradients_are_stock_transformers(tiny, input_ids, tmp_path, settings):
    stock = stock_v2(tiny, **settings)
    stock.save_pretrained(tmp_path)
    ours, info = DeepseekForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), "V2 has no balancing bias, and that is no missing tensor"
    torch.testing.assert_close(ours(input_ids).logits, stock(input_ids).logits, rtol=1e-5, atol=1e-5)
    for model in (ours, stock):
        model.train()(input_ids, labels=input_ids).loss.backward()
    expected = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        # Rotary halves lie in another order, hence sums are rounded in another order.
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_groups_are_judged_by_their_best_expert(tiny):
    """Against transformers' gate on many tokens; the sum of the two best, V3's rule, chooses otherwise."""
    stock = stock_v2(tiny, **GROUPED).model.layers[1].mlp.gate
    router = DeepseekRouter(DeepseekConfig(**{**tiny, **GROUPED, "scoring_func": "softmax", "norm_topk_prob": False}))
    router.load_state_dict(stock.state_dict(), strict=False)
    hidden = torch.randn(200, tiny["hidden_size"])
    expected = stock(hidden)[2].sort(-1)[0]
    assert torch.equal(router(hidden)[2].sort(-1)[0], expected)
    router.topk_method = "noaux_tc"
    assert not torch.equal(router(hidden)[2].sort(-1)[0], expected)


@pytest.mark.parametrize("settings", [GROUPED, LITE], ids=["grouped", "lite"])
def test_saved_and_loaded_again(tiny, input_ids, tmp_path, settings):
    stock_v2(tiny, **settings).save_pretrained(tmp_path / "v2")
    ours = DeepseekForCausalLM.from_pretrained(tmp_path / "v2")
    ours.save_pretrained(tmp_path / "ours")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(loaded) is DeepseekForCausalLM and not any(info.values())
    assert torch.equal(loaded(input_ids).logits, ours(input_ids).logits)
    assert loaded.config.topk_method == settings["topk_method"]


@pytest.mark.parametrize("settings", [GROUPED, LITE, CASES["yarn"]], ids=["grouped", "lite", "yarn"])
def test_export_is_what_it_was_loaded_from(tiny, input_ids, tmp_path, settings):
    stock = stock_v2(tiny, **settings)
    stock.save_pretrained(tmp_path / "v2")
    export_deepseek_v2(DeepseekForCausalLM.from_pretrained(tmp_path / "v2"), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py")), "none of our code"
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(again) is DeepseekV2ForCausalLM and not any(info.values())
    assert torch.equal(again(input_ids).logits, stock(input_ids).logits)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("v2", "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_what_v2_or_v3_cannot_express_is_refused_by_name(tiny, tmp_path):
    model = DeepseekForCausalLM(DeepseekConfig(**tiny))
    with pytest.raises(ValueError, match=r"scoring_func='sigmoid', topk_method='noaux_tc', norm_topk_prob=True"):
        export_deepseek_v2(model, tmp_path / "v2")
    stock_v2(tiny, **GROUPED).save_pretrained(tmp_path / "stock")
    model = DeepseekForCausalLM.from_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match=r"topk_method='group_limited_greedy'.* cannot be expressed in deepseek_v3"):
        export_deepseek_v3(model, tmp_path / "v3")
    assert "topk_method='group_limited_greedy'" in obstacles_to_gguf(model.config.to_dict())
    model.model.layers[1].mlp.gate.e_score_correction_bias[0] = 0.1
    with pytest.raises(ValueError, match="e_score_correction_bias other than 0 cannot be expressed in deepseek_v2"):
        export_deepseek_v2(model, tmp_path / "v2")


def released(tiny, tmp_path, **settings):
    """The settings as DeepSeek writes them, with those that transformers drops."""
    stock_v2(tiny, **GROUPED).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {
        "auto_map": {"AutoConfig": "x.Y"},
        "seq_aux": True,
        "scoring_func": "softmax",
    }
    path.write_text(json.dumps({**config, **settings}))
    return tmp_path


def test_norm_topk_prob_follows_deepseeks_code(tiny, tmp_path):
    """DeepSeek's own gate normalizes *instead of* scaling; transformers ignores the setting."""
    folder = released(tiny, tmp_path, norm_topk_prob=True)
    router = DeepseekForCausalLM.from_pretrained(folder).model.layers[1].mlp.gate
    hidden = torch.randn(5, tiny["hidden_size"])
    logits, weights, indices = router(hidden)
    scores = logits.softmax(-1).gather(1, indices)
    torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True))


def test_the_first_spelling_of_greedy(tiny, input_ids, tmp_path):
    stock = stock_v2(tiny, **LITE)
    stock.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "topk_method": "gready"}))
    ours = DeepseekForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(ours(input_ids).logits, stock(input_ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topk_method": "random"}, "topk_method: got 'random', expected greedy or"),
        ({"scoring_func": "sigmoid"}, "scoring_func: got 'sigmoid', expected softmax"),
        ({"moe_layer_freq": 2}, "moe_layer_freq: got 2, expected 1"),
        ({"mlp_bias": True}, "mlp_bias: got True, expected False"),
    ],
)
def test_settings_out_of_range(tiny, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        DeepseekForCausalLM.from_pretrained(released(tiny, tmp_path, **settings))
