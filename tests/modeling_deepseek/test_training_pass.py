"""What part of a step's auxiliary losses each forward pass bears."""

import pytest
import torch
from accelerate.state import GradientState
from torch import nn

from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM
from modeling_deepseek.training_pass import PassWeight, set_accumulation_steps


@pytest.fixture
def tell_last_pass():
    """Say, as accelerate and Trainer do, whether the pass that begins is the last of its step."""
    state = GradientState()
    yield state._set_sync_gradients
    state._set_sync_gradients(True)


def take_step(weight, num_passes, tell_last_pass):
    taken = []
    for number in range(num_passes):
        tell_last_pass(number == num_passes - 1)
        taken.append(weight.take())
    return taken


@pytest.mark.parametrize("steps", [[1, 1], [4, 4, 4], [5, 2, 5], [2, 7, 7], [3, 1, 3, 8]])
def test_the_passes_of_every_step_share_the_weight_one(tell_last_pass, steps):
    weight = PassWeight()
    for number, num_passes in enumerate(steps):
        taken = take_step(weight, num_passes, tell_last_pass)
        assert sum(taken) == pytest.approx(1) and all(part > 0 for part in taken)
        if number and num_passes == max(steps[:number]):
            assert taken == pytest.approx([1 / num_passes] * num_passes), "equal once the number is known"


def test_the_first_step_does_not_know_how_many_follow(tell_last_pass):
    assert take_step(PassWeight(), 4, tell_last_pass) == pytest.approx([1 / 2, 1 / 6, 1 / 12, 1 / 4])


def test_without_accelerates_word_every_pass_is_a_step():
    weight = PassWeight()
    assert [weight.take() for _ in range(3)] == [1, 1, 1]


def test_a_last_pass_that_never_comes_does_not_end_the_losses(tell_last_pass):
    tell_last_pass(False)
    weight = PassWeight()
    total = sum(weight.take() for _ in range(3 * PassWeight._LONGEST_STEP))
    assert 2.9 < total < 3.1


def test_a_number_that_is_told_wins(tell_last_pass):
    model = DeepseekForCausalLM(DeepseekConfig.from_preset("debug"))
    set_accumulation_steps(nn.ModuleDict({"wrapped": model}), 4)
    tell_last_pass(False)
    assert model.model.pass_weight.take() == 0.25
    set_accumulation_steps(model, None)
    assert model.model.pass_weight.num_passes is None
    with pytest.raises(ValueError, match="num_passes: got 0, expected at least 1"):
        set_accumulation_steps(model, 0)


def test_a_loop_that_tells_accumulates_the_gradient_of_one_batch():
    rows = torch.randint(3, 512, (4, 12), generator=torch.Generator().manual_seed(0))
    gradients = []
    for parts in (1, 4):
        torch.manual_seed(0)
        config = DeepseekConfig.from_preset(
            "debug", seq_aux_loss_coef=0.5, router_z_loss_coef=0.2, num_nextn_predict_layers=1, mtp_loss_coef=0.3
        )
        model = DeepseekForCausalLM(config).train()
        set_accumulation_steps(model, parts)
        for part in rows.chunk(parts):
            (model(part).logits.sum() * 0).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)
    assert gradients[0]["model.layers.3.eh_proj.weight"].abs().max() > 1e-5
