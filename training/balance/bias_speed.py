"""Whether a model has a balancing bias that a training could move: asked before anything is written."""

from torch import nn

from modeling_deepseek.families import find_moe_layers


def check_bias_speed(model: nn.Module, bias_update_speed: float | None) -> None:
    """Raise a one-line ValueError if a speed is set and no router of the model has a balancing bias.

    Args:
        model: Of any family.
        bias_update_speed: The speed; None and 0 always pass.
    """
    if not bias_update_speed:
        return
    layers = find_moe_layers(model)
    if not any(layer.bias is not None for layer in layers):
        raise ValueError(
            f"bias_update_speed: got {bias_update_speed} for {type(model).__name__}, expected None or 0; "
            "its routers have no balancing bias" + (" (seq_aux_loss_coef balances them)" if layers else "")
        )
