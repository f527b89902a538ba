"""Going on with a training that also trains prediction layers, which loading a checkpoint leaves out by default."""

import torch
from transformers import TrainingArguments

from deepseek_training.recipes.pretrain_and_adapt import TrainerSettings
from deepseek_training.trainer.stage_trainer import StageTrainer
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM
from modeling_deepseek.training_pass import set_accumulation_steps


def test_prediction_layers_come_back_from_a_checkpoint(tmp_path):
    config = DeepseekConfig.from_preset("debug", num_nextn_predict_layers=1, mtp_loss_coef=0.3)
    saved, resumed = DeepseekForCausalLM(config), DeepseekForCausalLM(config)
    saved.save_pretrained(tmp_path / "checkpoint-1")
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    recipe = TrainerSettings(max_steps=1, learning_rate=1e-3)
    trainer = StageTrainer(recipe, [], dataset=None, model=resumed, args=arguments)
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    wanted, found = saved.state_dict(), resumed.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert resumed.config.mtp_loss_coef == 0.3


def test_accumulating_uneven_sequences_changes_no_prediction_gradient():
    """The mean goes over sequences first: lengths 16 and 5 in one pass, or in two of half the weight."""
    torch.manual_seed(0)
    config = DeepseekConfig.from_preset("debug", num_nextn_predict_layers=1, mtp_loss_coef=0.3)
    model = DeepseekForCausalLM(config).train()
    rows = torch.randint(3, 512, (2, 16))
    mask = torch.ones_like(rows)
    mask[1, 5:] = 0
    gradients = []
    for parts in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        model.zero_grad()
        for part in parts:
            set_accumulation_steps(model, len(parts))
            (model(input_ids=rows[part], attention_mask=mask[part]).logits.sum() * 0).backward()
        gradients.append(model.model.layers[-1].eh_proj.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)
    assert gradients[0].abs().max() > 1e-6
