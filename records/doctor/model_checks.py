"""Checks of a checkpoint and of what a recipe makes of it. Each returns a `Finding`, or None where all is well."""

import re
from collections.abc import Mapping

from deepseek_records.doctor.recomputation import share_of_changed_choices
from deepseek_records.doctor.subject import Finding, NotCheckedError, Subject, number

_LATER = re.compile(r"(?:^|\.)(?:mtp|mtp_layers|mtp_block)\.|(?:^|\.)layers\.(\d+)\.")
_CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
# What our configuration has and no other reads.
_DYNAMIC_SETTINGS = ("min_experts_per_tok", "expert_top_p", "target_experts_per_tok")


def bias_never_moves(subject: Subject) -> Finding | None:
    """A balancing bias that nothing updates: no code of transformers does."""
    settings = subject.settings
    if not any(layer.bias_owner is not None for layer in subject.layers):
        return None
    asked = settings.get("bias_update_speed")
    if asked is not None:  # 0 is somebody's choice
        number(settings, "bias_update_speed")
        return None
    if subject.is_ours and subject.config.router_bias_update_speed > 0:
        return None
    made = settings.get("model")  # settings of a new model, such as pretrain makes; its presets move the bias
    if isinstance(made, Mapping) or "preset" in settings:
        return None
    return Finding(
        f"the balancing bias of {len(subject.layers)} routers never moves in this training",
        "set bias_update_speed: 0.001 (DeepSeek-V3's), or in a trainer of your own callbacks="
        "[ExpertBalanceCallback(bias_update_speed=0.001)]; bias_update_speed: 0 keeps it still on purpose",
    )


def experts_not_quantized(subject: Subject) -> Finding | None:
    """Linear layers alone are replaced by bitsandbytes; fused experts stay as they are."""
    quantization = subject.raw_config.get("quantization_config") or {}
    asked = subject.recipe or {}
    bits = next(
        (bits for bits in (4, 8) if asked.get(f"load_in_{bits}bit") or quantization.get(f"load_in_{bits}bit")), None
    )
    experts = subject.expert_parameters()
    if bits is None or not experts:
        return None
    share = sum(parameter.numel() for parameter in experts.values()) / subject.num_parameters
    return Finding(
        f"load_in_{bits}bit leaves the experts unquantized: {share:.0%} of the parameters",
        f"plan memory for them in bf16, or quantize the experts' own tensors; load_in_{bits}bit reaches "
        "linear layers only",
    )


def mtp_dropped(subject: Subject) -> Finding | None:
    """Prediction layers in the files that the model class ignores, and so loses at the next save."""
    if subject.is_ours or (subject.is_own_stage and subject.config.model_type == "deepseek_v3"):
        return None
    num_layers = subject.config.get_text_config().num_hidden_layers
    known = subject.skeleton.state_dict().keys()
    dropped = [name for name in subject.headers if name not in known and _is_prediction(name, num_layers)]
    if not dropped:
        return None
    return Finding(
        f"{len(dropped)} tensors of multi-token prediction layers are dropped on loading by the Auto class, "
        f"{dropped[0]} among them",
        "deepseek-moe's own commands keep them (pass their recipe); in Python call "
        "deepseek_records.kept_mtp.keep_mtp(model) after loading, before anything is saved",
    )


def _is_prediction(name: str, num_layers: int) -> bool:
    match = _LATER.search(name)
    return match is not None and (match[1] is None or int(match[1]) >= num_layers)


def indexer_frozen(subject: Subject) -> Finding | None:
    """A sparse-attention indexer gets no gradient from the model's loss: its top-k has none."""
    subject.settings  # noqa: B018  (asked of a training only)
    names = [name for name, _ in subject.skeleton.named_parameters() if ".indexer." in name]
    if not names:
        return None
    return Finding(
        f"{len(names)} tensors of the attention's indexer get no gradient, {names[0]} among them",
        "deepseek_training.indexer.IndexerTrainingCallback.attach(trainer, warmup_steps=1000) trains it to choose "
        "what the attention looks at; or freeze it knowingly with requires_grad_(False)",
    )


def _pooled_coefficient(subject: Subject) -> float:
    """Weight of transformers' own balance loss in this training; 0 where it is off."""
    settings, config = subject.settings, subject.config.get_text_config()
    if subject.is_ours or not subject.layers:
        return 0.0
    own = getattr(config, "router_aux_loss_coef", None)
    asked = settings.get("router_aux_loss_coef")
    if own is None and asked is None:
        return 0.0
    is_on = settings.get("output_router_logits", getattr(config, "output_router_logits", False))
    if asked is None and not is_on:
        return 0.0
    return number({"router_aux_loss_coef": own if asked is None else asked}, "router_aux_loss_coef")


def pooled_balance_loss(subject: Subject) -> Finding | None:
    """One loss over the pooled load of all layers, where opposite collapses cancel out."""
    coefficient = _pooled_coefficient(subject)
    if not coefficient or len(subject.layers) < 2:
        return None
    return Finding(
        f"router_aux_loss_coef={coefficient:g} pools {len(subject.layers)} layers and all sequences: layers that "
        "collapse onto different experts look balanced",
        "output_router_logits: false and router_aux_loss_coef: 0, with ExpertBalanceCallback(seq_aux_loss_coef=1e-4)",
    )


def balance_loss_times_accumulation(subject: Subject) -> Finding | None:
    """The model adds its balance loss whole to each pass, while the main loss is divided by the step's tokens."""
    steps = number(subject.settings, "gradient_accumulation_steps")
    coefficient = _pooled_coefficient(subject)
    if not coefficient or steps <= 1:
        return None
    return Finding(
        f"router_aux_loss_coef={coefficient:g} counts {steps:g} times per optimizer step, as often as passes",
        f"router_aux_loss_coef: {coefficient / steps:g}, or ExpertBalanceCallback(seq_aux_loss_coef=...), which "
        "divides by the passes",
    )


def bias_in_few_bits(subject: Subject) -> Finding | None:
    """In bf16 a bias of 0.5 stays 0.5 when 0.001 is added."""
    attributes = {layer.bias_owner[1] for layer in subject.layers if layer.bias_owner is not None}
    if not attributes:
        return None
    narrow = [
        (name, tensor.dtype)
        for name, tensor in subject.headers.items()
        if name.rpartition(".")[2] in attributes and tensor.dtype not in ("F32", "F64")
    ]
    if not narrow:
        return None
    return Finding(
        f"{len(narrow)} balancing biases are stored in {narrow[0][1]}, {narrow[0][0]} among them: steps of 0.001 "
        "are lost",
        "train with ExpertBalanceCallback, which widens them to float32, or convert them before; take the "
        "released values where they were rounded",
    )


def recomputed_routing(subject: Subject) -> Finding | None:
    """A layer that checkpointing runs again must choose the same experts; measured by running it."""
    settings = subject.settings
    if not any(settings.get(name) for name in _CHECKPOINTING) or not subject.layers:
        return None
    options: object = next((settings[f"{n}_kwargs"] for n in _CHECKPOINTING if settings.get(f"{n}_kwargs")), {})
    if not isinstance(options, dict):
        raise ValueError(f"recipe: gradient_checkpointing_kwargs: got {options!r}, expected a mapping")
    changed = share_of_changed_choices(subject.model, options)
    if not changed:
        return None
    return Finding(
        f"run again in the backward pass, checkpointed layers send {changed:.0%} of the tokens to other experts",
        "remove what is random or stateful in the router (router_jitter_noise: 0), or keep "
        "gradient_checkpointing_kwargs: {preserve_rng_state: true}",
    )


def dynamic_experts_lost(subject: Subject) -> Finding | None:
    """Settings and state of a dynamic number of experts in a checkpoint whose class does not know them."""
    if subject.is_ours:
        return None
    if not subject.raw_config:
        raise NotCheckedError("needs a local checkpoint")
    config = subject.raw_config
    most = config.get("num_experts_per_tok")
    named = [name for name in _DYNAMIC_SETTINGS if config.get(name) not in (None, most)]
    state = [name for name in subject.tensors if ".share." in name]
    if not named and not state:
        return None
    return Finding(
        f"{', '.join(named) or state[0]} of a dynamic number of experts is not known to {config.get('model_type')}: "
        f"every token uses {most} experts",
        "load it as deepseek_moe, or export it with a fixed number (deepseek-moe export --to gguf --fixed-experts N) "
        "and take the measured difference into account",
    )
