"""Multi-token prediction layers of a stock model, made part of it and trained with it.

transformers drops these layers on loading, and builds them for drafting alone. `train_mtp` is called before a trainer
makes its optimizer; `adapt` and `sft` call it where a recipe sets `mtp_loss_coef`.
"""

import math

import torch
import transformers
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.modeling_layers import MtpModel

from deepseek_records.kept_mtp import keep_mtp, read_mtp
from deepseek_records.stages import is_number
from deepseek_training.mtp.mtp_loss import MASKED_LAYERS, MtpLoss, layer_types
from deepseek_training.mtp.official_names import OfficialNames
from deepseek_training.mtp.trained_class import TrainsMtp, make_class
from modeling_deepseek.conversion import fuse_expert_names
from modeling_deepseek.families import BIAS_NAMES, find_moe_layers


def train_mtp(model: PreTrainedModel, loss_coef: float = 0.3) -> PreTrainedModel:
    """Make the multi-token prediction layers of a model's checkpoint part of it, and train them with it.

    In training mode the gradient gets `loss_coef` times the mean over depths of the cross-entropy k + 1 tokens ahead,
    the model's too. `save_pretrained` writes the layers under their official names.

    Args:
        model: Loaded by an Auto class from a checkpoint that has such layers; changed in place. Adapters come after.
        loss_coef: Above 0 (DeepSeek-V3: 0.3, then 0.1).

    Returns:
        The model.

    Raises:
        ValueError: `loss_coef` is not a number above 0, or the model has no such layers or none that can be trained.

    Reference:
        DeepSeek-AI 2024, arXiv 2412.19437, section 2.2.
    """
    _check(model, loss_coef)
    if not keep_mtp(model):
        raise ValueError(
            f"mtp: got {model.config.name_or_path or 'a model that was not loaded'}, expected a checkpoint with "
            "multi-token prediction layers"
        )
    built = _build(model)
    names = OfficialNames(built, model, model.mtp_files)
    names.check(built)
    _widen(built, names, model)
    decoder = model.get_decoder()
    decoder.mtp_layers = built.layers
    loss = MtpLoss(built, names, loss_coef)
    if not isinstance(model, TrainsMtp):  # it is where the class of such a model has loaded it
        model.__class__ = make_class(type(model))
    model.mtp_loss, model.pass_weight = loss, loss.pass_weight
    model.mtp_prefix = next(name for name, module in model.named_modules() if module is decoder) + ".mtp_layers."
    model.register_forward_pre_hook(loss.note_labels, with_kwargs=True)
    decoder.register_forward_hook(loss.attach, with_kwargs=True)
    for layer in find_moe_layers(model):  # resuming, `Trainer` would begin with fresh experts
        if layer.experts is not None:
            layer.experts.register_load_state_dict_pre_hook(fuse_expert_names)
    return model


def _check(model: PreTrainedModel, loss_coef: float) -> None:
    if not is_number(loss_coef) or not 0 < loss_coef < math.inf:
        raise ValueError(f"mtp_loss_coef: got {loss_coef!r}, expected a number above 0")
    if isinstance(model, PeftModel):
        raise ValueError("mtp: got a model with an adapter, expected train_mtp before get_peft_model")
    if hasattr(type(model), "_carries_mtp"):
        raise ValueError(
            f"mtp: got {type(model).__name__}, expected a model of transformers; this one trains its layers itself, "
            "loaded with from_pretrained(path, mtp_loss_coef=0.3)"
        )
    if "mtp_loss" in vars(model):
        raise ValueError(f"mtp: got a {type(model).__name__} that train_mtp has prepared, expected one call")
    if vars(model).get("is_quantized", False):
        raise ValueError("mtp: got a quantized model, expected bf16 or fp32 weights")
    reason = untrainable(model)
    if reason:
        raise ValueError(f"mtp: got {type(model).__name__}, whose prediction layers cannot be trained: {reason}")


def untrainable(model: PreTrainedModel) -> str:
    """Return why a model's prediction layers cannot be trained; empty where they can.

    Args:
        model: Any; its weights are not looked at.
    """
    config = model.config
    if not hasattr(MtpModel, "forward_layer"):
        return f"got transformers {transformers.__version__}, expected 5.23 or later"
    if config.get_text_config() is not config:
        return "it takes more than text"
    if not hasattr(config, "num_mtp_layers"):
        return "transformers does not build them, for its configuration has no num_mtp_layers"
    if not config.num_mtp_layers:
        return f"num_mtp_layers is {config.num_mtp_layers}"
    try:
        with torch.device("meta"):
            built = MtpModel(model, config.num_mtp_layers)
    except (AttributeError, KeyError, RuntimeError, StopIteration, TypeError, ValueError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    odd = sorted({*layer_types(built)} - {*MASKED_LAYERS})
    if odd or built.use_shared_post_norm:
        return f"layers of {odd[0]}" if odd else "its depths share one norm"
    return ""


def _build(model: PreTrainedModel) -> MtpModel:
    """The layers with the checkpoint's weights, where the model's last layer is."""
    device = next(model.get_decoder().layers[-1].parameters()).device
    try:
        built = MtpModel.from_pretrained(model, device_map={"": device})
    except RuntimeError as error:  # some are missing
        raise ValueError(f"mtp: {' '.join(str(error).split())}") from None
    return built.train(model.training)


def _widen(built: MtpModel, names: OfficialNames, model: PreTrainedModel) -> None:
    """Read again as stored what the family keeps in fp32, such as balancing biases: transformers rounds it here."""
    parts = (*BIAS_NAMES, *(model._keep_in_fp32_modules_strict or ()))
    kept = {one: name for one, name in names.official.items() if any(part in one for part in parts)}
    stored = read_mtp({name: model.mtp_files[name] for name in kept.values()})
    tensors = {**dict(built.named_buffers()), **dict(built.named_parameters())}
    for one, name in kept.items():
        tensors[one].data = stored[name].to(tensors[one].device)
