"""A model trained from scratch balances its experts unless a recipe says otherwise; a loaded one only if asked."""

import pytest
import torch

from deepseek_training.balance import ExpertBalanceCallback
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM
from modeling_deepseek.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_balances(name):
    assert DeepseekConfig.from_preset(name).router_bias_update_speed > 0
    assert DeepseekConfig.from_preset(name, router_bias_update_speed=0.0).router_bias_update_speed == 0


@pytest.mark.parametrize("name", ["nano", "debug"])
def test_a_preset_moves_its_bias_and_a_loaded_model_does_not(name, tmp_path):
    model = DeepseekForCausalLM(DeepseekConfig.from_preset(name, num_hidden_layers=2))
    model.save_pretrained(tmp_path)
    for trained, moves in ((model, True), (DeepseekForCausalLM.from_pretrained(tmp_path), False)):
        callback = ExpertBalanceCallback()
        callback.begin(trained.train())
        trained(input_ids=torch.arange(3, 35).view(2, 16))
        callback.finish_step()
        callback.end(trained)
        bias = trained.model.layers[1].mlp.gate.e_score_correction_bias
        assert bool(bias.abs().max() > 0) is moves
