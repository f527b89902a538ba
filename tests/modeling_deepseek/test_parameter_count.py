import pytest
import torch
import transformers

from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM
from modeling_deepseek.parameter_count import count_parameters


def test_154b_counts_out():
    config = DeepseekConfig.from_preset("154b")
    count = count_parameters(config)
    assert count.total == pytest.approx(154e9, rel=0.005)
    assert count.active / count.total == pytest.approx(0.24, abs=0.005)
    assert (config.n_routed_experts, config.min_experts_per_tok, config.num_experts_per_tok) == (128, 8, 12)
    assert count_parameters(config, 8).active < count.active


def test_7b_counts_out():
    assert count_parameters(DeepseekConfig.from_preset("7.7b")).total == pytest.approx(7.7e9, rel=0.01)


def test_small_presets_are_small():
    assert count_parameters(DeepseekConfig.from_preset("nano")).total == pytest.approx(3e6, rel=0.2)
    assert count_parameters(DeepseekConfig.from_preset("debug")).total < 1e6


@pytest.mark.parametrize(
    "settings", [{}, {"router_key_dim": 6, "norm_type": "layernorm"}, {"tie_word_embeddings": True}]
)
def test_parts_add_up_and_agree_with_the_formulas(tiny, settings):
    """Witness: sizes written out by hand from the paper's shapes."""
    config = DeepseekConfig(**{**tiny, **settings})
    count = count_parameters(config)
    assert count.total == sum(p.numel() for p in DeepseekForCausalLM(config).parameters())
    c = config
    assert count.parts["embedding"] == 97 * 32
    assert count.parts["head"] == (0 if c.tie_word_embeddings else 97 * 32)
    assert count.parts["routed experts"] == 2 * 8 * 3 * 32 * 24
    assert count.parts["shared experts"] == 2 * 3 * 32 * 24
    assert count.parts["dense feed-forward"] == 3 * 32 * 44
    assert count.parts["router"] == 2 * (6 * 32 + 8 * 6 if c.router_key_dim else 8 * 32)
    query, key_value, out = 32 * 12 + 12 * 2 * 20, 32 * 24 + 16 * 2 * 22, 2 * 10 * 32
    assert count.parts["attention"] == 3 * (query + key_value + out)
    assert count.parts["norms"] == (3 * (2 * 32 + 12 + 16) + 32) * (2 if c.norm_type == "layernorm" else 1)
    assert count.active == count.total - count.parts["routed experts"] * 5 / 8


# transformers 5.17 computes the rotary angles by a matrix product, which torch's counter counts: 1e-4 of these models.
ROTARY = 1e-6 if transformers.__version__ >= "5.23" else 2e-4


@pytest.mark.parametrize("tied", [True, False])
def test_flops_agree_with_torchs_counter(tiny, tied):
    """Witness: torch's own FLOP counter over a real forward pass with eager attention, which computes both halves."""
    from torch.utils.flop_counter import FlopCounterMode

    config = DeepseekConfig(**{**tiny, "tie_word_embeddings": tied, "num_experts_per_tok": 4})
    model = DeepseekForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("batched_mm")
    length = 31
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long) + 5)
    count = count_parameters(config)
    # Eager attention multiplies the masked half too: a context twice as long in the formula's causal average.
    assert count.flops_per_token(2 * length) * length == pytest.approx(counter.get_total_flops(), rel=ROTARY)
    assert count.flops_per_token(length, is_dense=True) > count.flops_per_token(length)


@pytest.mark.parametrize("tied", [True, False])
def test_prediction_layers_count_while_they_train(tiny, tied):
    """Witness: torch's counter over a training pass; the last tokens predict nothing, so the head skips them."""
    from torch.utils.flop_counter import FlopCounterMode

    settings = {**tiny, "tie_word_embeddings": tied, "num_nextn_predict_layers": 2}
    config = DeepseekConfig(**settings, mtp_loss_coef=0.3)
    model = DeepseekForCausalLM(config).train()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("batched_mm")
    length = 31
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.long) + 5)
    count, without = count_parameters(config), count_parameters(DeepseekConfig(**settings))
    # And each depth averages its tokens' losses by a product, one multiplication and one addition a token.
    skipped = 2 * 97 * 32 * (2 + 3) - 2 * 2 * length
    assert count.flops_per_token(2 * length) * length - skipped == pytest.approx(counter.get_total_flops(), rel=ROTARY)
    assert count.total == sum(p.numel() for p in model.parameters()) and count.parts["prediction"] == 2 * 64 * 32
    assert without.total < count.total and "prediction" not in without.parts
