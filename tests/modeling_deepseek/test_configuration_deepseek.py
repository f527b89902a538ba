import pytest
from transformers import AutoConfig, DeepseekV3Config

from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM


def test_defaults_are_deepseek_v3s():
    ours, stock = DeepseekConfig().to_dict(), DeepseekV3Config().to_dict()
    differing = {key for key, value in stock.items() if ours[key] != value}
    assert differing == {"model_type"}
    assert not DeepseekConfig().has_dynamic_experts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: got 9, expected at most n_routed_experts=8"),
        (
            {"num_experts_per_tok": 5},
            "num_experts_per_tok: got 5, expected at most the 4 experts of topk_group",
        ),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok: got 0, expected"),
        ({"min_experts_per_tok": 4}, "min_experts_per_tok: got 4, expected at most num_experts_per_tok=3"),
        ({"min_experts_per_tok": 0}, "min_experts_per_tok: got 0, expected"),
        ({"min_experts_per_tok": 1, "target_experts_per_tok": 3.5}, "target_experts_per_tok: got 3.5, expected"),
        ({"target_experts_per_tok": 2}, "target_experts_per_tok: got 2, expected"),
        ({"min_experts_per_tok": 1, "expert_top_p": 0.0}, "expert_top_p: got 0.0, expected None or in"),
        ({"min_experts_per_tok": 1, "expert_top_p": 1.01}, "expert_top_p: got 1.01, expected"),
        ({"scoring_func": "relu"}, "scoring_func: got 'relu', expected sigmoid or softmax"),
        ({"norm_type": "batchnorm"}, "norm_type: got 'batchnorm', expected rmsnorm or layernorm"),
        ({"hidden_dropout": 1.0}, "hidden_dropout: got 1.0, expected"),
        ({"hidden_dropout": float("nan")}, "hidden_dropout: got nan, expected"),
        ({"router_key_dim": 0}, "router_key_dim: got 0, expected"),
        ({"n_group": 3}, "n_group: got 3, expected a divisor of n_routed_experts=8"),
        ({"n_group": 8, "topk_group": 8}, "n_group: got 8, expected groups of at least 2"),
        ({"topk_group": 3}, "topk_group: got 3, expected"),
        ({"hidden_size": -1}, "hidden_size: got -1, expected"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim: got 7, expected an even number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: got 3, expected"),
        ({"router_z_loss_coef": -1e-3}, "router_z_loss_coef: got -0.001, expected"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(tiny, settings, message):
    with pytest.raises(ValueError) as caught:
        DeepseekConfig(**{**tiny, **settings})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_setting_changed_after_construction_is_refused_by_the_model(tiny):
    config = DeepseekConfig(**tiny)
    config.num_experts_per_tok = 99
    with pytest.raises(ValueError, match="num_experts_per_tok: got 99, expected"):
        DeepseekForCausalLM(config)


def test_targets(tiny):
    def target(**settings):
        return DeepseekConfig(**{**tiny, **settings}).mean_experts_target

    assert target() is None
    assert target(min_experts_per_tok=3) is None
    assert target(min_experts_per_tok=1) == 2
    assert target(min_experts_per_tok=1, target_experts_per_tok=2.5) == 2.5
    assert target(min_experts_per_tok=1, expert_top_p=0.5) is None
    assert target(min_experts_per_tok=1, expert_top_p=0.5, target_experts_per_tok=2.5) == 2.5


def test_presets_take_overrides_and_name_the_nearest_setting():
    assert DeepseekConfig.from_preset("nano", vocab_size=300, num_experts=8).n_routed_experts == 8
    with pytest.raises(ValueError, match="did you mean vocab_size"):
        DeepseekConfig.from_preset("nano", vocabsize=300)
    with pytest.raises(ValueError, match="preset: got 'huge', expected one of 154b"):
        DeepseekConfig.from_preset("huge")


def test_saved_settings_come_back(tmp_path, tiny):
    added = {
        "scoring_func": "softmax",
        "min_experts_per_tok": 1,
        "target_experts_per_tok": 1.5,
        "expert_top_p": 0.25,
        "router_key_dim": 6,
        "norm_type": "layernorm",
        "hidden_dropout": 0.125,
    }
    config = DeepseekConfig(**tiny, **added)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is DeepseekConfig
    assert {key: getattr(loaded, key) for key in added} == added
    loaded.name_or_path = ""
    assert loaded.to_dict() == config.to_dict()


def test_another_models_checkpoint_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type: got 'llama', expected"):
        DeepseekConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_experts_per_tok": 12, "min_experts_per_tok": 12},
        {"num_experts_per_tok": 8},
        {"min_experts_per_tok": None},
        {"num_labels": 1},
    ],
)
def test_a_preset_takes_other_bounds_and_settings_of_transformers(overrides):
    config = DeepseekConfig.from_preset("154b", **overrides)
    assert all(getattr(config, name) == value for name, value in overrides.items())


@pytest.mark.parametrize("overrides", [{"expert_top_p": 0.3, "min_experts_per_tok": None}, {"n_routed_experts": 1}])
def test_settings_without_effect_or_use_are_refused(overrides):
    with pytest.raises(ValueError, match=r": got .*, expected "):
        DeepseekConfig.from_preset("debug", **{"num_experts_per_tok": 1, **overrides})
