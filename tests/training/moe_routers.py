"""The routers of a model, for tests that look into them."""

from torch import nn

from modeling_deepseek.families import find_moe_layers


def find_routers(model: nn.Module) -> list[nn.Module]:
    """Return a model's routers in order of layers."""
    return [layer.router for layer in find_moe_layers(model)]
