import time

import pytest
import torch
from torch import nn

from deepseek_cli.benchmarks.step_cost import (
    Shape,
    begin_balancing,
    build_models,
    compare,
    median_step_times,
    train_step,
)
from modeling_deepseek.families import find_moe_layers

TINY = Shape(8, 2, 64, 16, 2, 12)


def test_all_models_start_alike_and_ours_does_more():
    """Equal logits before; after a step ours' bias has moved and the prediction layer has had a gradient."""
    models = build_models(TINY)
    input_ids = torch.randint(3, 2048, (2, 12), generator=torch.Generator().manual_seed(0))
    logits = [model.eval()(input_ids).logits for model in models.values()]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-4, atol=1e-5)
    stock = models["stock eager"].train()
    expected = train_step(stock, torch.optim.SGD(stock.parameters(), lr=0.0), input_ids)
    for name in ("ours", "ours with MTP"):
        model = models[name].train()
        before = [parameter.clone() for parameter in model.parameters()]
        loss = train_step(model, torch.optim.AdamW(model.parameters(), lr=1e-4), input_ids, begin_balancing(model))
        assert loss == pytest.approx(expected), "the auxiliary losses do not show"
        assert all(layer.bias.abs().max() > 5e-4 for layer in find_moe_layers(model))
        changed = [not torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True)]
        assert all(changed), "every parameter, the prediction layer's too"
    assert len(find_moe_layers(models["ours with MTP"])) == len(find_moe_layers(models["ours"])) + 1


def test_the_comparison_of_a_tiny_shape():
    found = compare(TINY, 2)
    assert found["best_stock"] in found["seconds"] and found["shape"]["n_routed_experts"] == 8
    for name in ("ours", "ours with MTP"):
        assert found["ratios"][name] == pytest.approx(found["seconds"][found["best_stock"]] / found["seconds"][name])


def test_one_far_behind_is_dropped_after_the_warm_up():
    class Slow(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.weight, self.seconds, self.num_steps = nn.Parameter(torch.ones(1)), seconds, 0

        def forward(self, **inputs):
            time.sleep(self.seconds)
            self.num_steps += 1
            return type("Output", (), {"loss": self.weight.sum()})

    models = {"stock fast": Slow(0.005), "stock slow": Slow(0.05), "ours": Slow(0.06)}
    medians = median_step_times(models, torch.zeros(1, 1), 3, drop_slow=["stock fast", "stock slow"])
    assert list(medians) == ["stock fast", "ours"], "ours is never dropped"
    assert models["stock slow"].num_steps == 2 and models["ours"].num_steps == 5
    assert medians["ours"] > 0.06
