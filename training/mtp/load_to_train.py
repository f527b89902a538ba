"""The model that `adapt` and `sft` start from, with the prediction layers that a recipe asks to be trained."""

from transformers import PreTrainedModel

from deepseek_records.loading import is_adapter, load_config, resolve_checkpoint
from deepseek_training.launch.plan import load_or_outline
from deepseek_training.mtp.stock_mtp import train_mtp
from deepseek_training.recipes.pretrain_and_adapt import MtpSettings
from modeling_deepseek import DeepseekConfig


def load_to_train(recipe: MtpSettings, *, is_dry: bool) -> PreTrainedModel:
    """Return the recipe's model; ours trains its prediction layers by itself, another's by `train_mtp`.

    Args:
        recipe: The settings.
        is_dry: As for `load_or_outline`; a model that is only outlined is without these layers.

    Raises:
        ValueError: The model has no layers that `mtp_loss_coef` could train.
    """
    coef = recipe.mtp_loss_coef
    if coef is None:
        return load_or_outline(recipe.model, is_dry=is_dry)
    if is_adapter(resolve_checkpoint(recipe.model)):
        raise ValueError(
            f"mtp_loss_coef: got {coef} for an adapter, expected null, or a model made by deepseek-moe merge"
        )
    is_ours = load_config(recipe.model).model_type in (DeepseekConfig.model_type, "deepseek_v3")
    if not is_ours:
        model = load_or_outline(recipe.model, is_dry=is_dry)
        return model if model.device.type == "meta" else train_mtp(model, coef)
    return load_or_outline(recipe.model, is_dry=is_dry, mtp_loss_coef=coef)
