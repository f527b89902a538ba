"""The decoder layers of a model of any family."""

from torch import nn


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's layers by name, in order: the modules that it does not split (`_no_split_modules`).

    Args:
        model: A `PreTrainedModel`; of another module there are none.
    """
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    return {name: module for name, module in model.named_modules() if type(module).__name__ in kinds}
