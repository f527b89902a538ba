"""A router forced to collapse recovers through its balancing bias, in every family of transformers that has one."""

import pytest
import torch
from tiny_families import NUM_EXPERTS, build_tiny, find_experts_classes, loss_of, token_ids
from torch import nn

from deepseek_training.balance.callback import ExpertBalanceCallback
from modeling_deepseek.families import find_moe_layers

NUM_STEPS = 60
# A step is to be small beside the spread of a router's scores.
SPEEDS = {"softmax": 0.007, "sigmoid": 0.02, "sqrtsoftplus": 0.02}
LOGIT_SPEEDS = {"Kolibri1TopKRouter": 0.06}  # adds its bias to logits instead of scores
CLASSES = dict(map(reversed, find_experts_classes()))
DEFAULT = ("DeepseekV3Experts",)


@torch.no_grad()
def collapse(model):
    """Let each router's weights send every token to the same experts, as many as a token uses.

    Every embedding gets a common direction, and the gate's rows of those experts the mean of the router's inputs. A
    router whose gate is not one matrix (Zaya) gets a bias that does the same.
    """
    embedding = model.get_input_embeddings().weight
    embedding.copy_(torch.randn(embedding.shape) + 0.7)
    for layer in find_moe_layers(model):
        inputs = []
        handle = layer.router.register_forward_pre_hook(lambda _, args, seen=inputs: seen.append(args[0]))
        loss_of(model, token_ids(8))
        handle.remove()
        hidden = inputs[0].flatten(0, -2).float()
        weights = [p for p in layer.router.parameters() if p.shape == (NUM_EXPERTS, hidden.shape[1])]
        chosen = num_chosen(model)
        if weights:
            weight, direction = weights[0], hidden.mean(0)
            weight.copy_(torch.randn(weight.shape) / hidden.norm(dim=1).mean())
            weight[:chosen] += 3 * direction / direction.square().sum()
        else:
            for parameter in layer.router.parameters():
                parameter.mul_(5 if parameter.ndim == 2 else 1)
            layer.bias[:chosen] += 0.5


def num_chosen(model):
    config = model.config.get_text_config()
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_k")
    return next(getattr(config, name) for name in names if hasattr(config, name))


def imbalance(model, callback):
    """Max / mean of the worst layer with a bias, over the callback's own count of one batch."""
    callback.begin(model)
    loss_of(model, token_ids(32, seed=9))
    counted = zip(callback._observer.counted_layers, callback._observer.take(over_ranks=False), strict=True)
    loads = [counts.tokens_per_expert.double() for layer, counts in counted if layer.bias is not None]
    callback.end(model)
    return max((load.max() / load.mean()).item() for load in loads if load.any())


@pytest.mark.parametrize("name", [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow)
                                  for name in CLASSES])  # fmt: skip
def test_a_collapsed_router_recovers(name):
    model = build_tiny(CLASSES[name], name).train()
    layers = [layer for layer in find_moe_layers(model) if layer.bias is not None]
    if not layers:
        pytest.skip("no balancing bias")
    collapse(model)
    mean = NUM_EXPERTS / num_chosen(model)
    before = imbalance(model, ExpertBalanceCallback())
    assert before > 0.8 * mean
    found = {}
    own_speed = LOGIT_SPEEDS.get(type(layers[0].router).__name__, SPEEDS[layers[0].scores])
    for speed in (None, own_speed):
        callback = ExpertBalanceCallback(speed)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        train(model, callback)
        found[speed] = imbalance(model, ExpertBalanceCallback())
        model.load_state_dict(state)
    without, balanced = found.values()
    print(f"{name}: {before:.2f} -> {without:.2f} without, {balanced:.2f} with")
    assert balanced <= 2.2 * mean / 4
    assert without > balanced


def train(model: nn.Module, callback):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    callback.begin(model)
    for step in range(NUM_STEPS):
        loss_of(model, token_ids(16, seed=step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        callback.finish_step()
    callback.end(model)
