"""A value model that shares the frozen weights of a LoRA policy: its own adapter and head on the same tensors.

Called by `deepseek_training.ppo.trainer` where a LoRA policy comes without a value model. The two are
separate modules with the same parameter objects, rather than one module whose adapter is switched back and forth: a
switch would have to be right also while activation checkpointing runs a layer again inside the backward pass.
Buffers (rotary frequencies, balancing biases) are small and copied, since a training pass may change them.
"""

import copy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftModelForSequenceClassification
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel


class LoraValueModel(PeftModelForSequenceClassification):
    """A sequence classifier with LoRA adapter and trained head, in the form that PPO reads value models."""

    base_model_prefix = "decoder"

    @property
    def decoder(self) -> nn.Module:
        """The model below the head, adapter included."""
        classifier = self.get_base_model()
        return getattr(classifier, classifier.base_model_prefix)


def value_model_for(policy: PreTrainedModel | PeftModel, peft_config: LoraConfig | None) -> LoraValueModel:
    """Return the value model of a policy that came without one.

    Args:
        policy: A causal language model, with or without adapter.
        peft_config: What PPO will make an adapter of; None if the policy has its adapter already, or none.

    Raises:
        ValueError: The policy is not a LoRA one, so that its weights will change.
    """
    if peft_config is None and isinstance(policy, PeftModel):
        peft_config = policy.peft_config[policy.active_adapter]
    if not isinstance(peft_config, LoraConfig):
        raise ValueError(
            "value_model=None: only a LoRA policy has frozen weights to share; pass a sequence classifier with one "
            "label, or peft_config=LoraConfig(...)"
        )
    return shared_value_model(policy, peft_config)


def shared_value_model(policy: PreTrainedModel | PeftModel, peft_config: LoraConfig) -> LoraValueModel:
    """Return a value model on the policy's own weights; its values start at 0.

    Args:
        policy: A causal language model, with or without adapter; its adapter is not shared.
        peft_config: The policy's LoRA settings; rank, targets and dropout are used for the value model's adapter too.

    Raises:
        ValueError: The policy's architecture has no sequence classifier.
    """
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    if hasattr(config, "mtp_loss_coef"):
        config.mtp_loss_coef = 0.0  # nothing predicts tokens here
    try:
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise ValueError(
            f"value_model: transformers has no sequence classifier for {config.model_type}; pass a value model"
        ) from error
    backbone = without_adapter(policy, {id(policy.config): config})
    setattr(classifier, classifier.base_model_prefix, getattr(backbone, classifier.base_model_prefix))
    head = nn.Linear(classifier.score.in_features, 1, bias=False, device=policy.device, dtype=policy.dtype)
    classifier.score = head.requires_grad_(True)
    nn.init.zeros_(head.weight)  # a random head would start with a random baseline
    settings = copy.deepcopy(peft_config)
    settings.task_type, settings.modules_to_save = "SEQ_CLS", None
    return LoraValueModel(classifier, settings)


def without_adapter(policy: PreTrainedModel | PeftModel, replaced: dict[str, Any] | None = None) -> PreTrainedModel:
    """Return the policy without its adapter: new modules, the same parameters.

    Args:
        policy: Left as it is.
        replaced: Objects to put in the place of the policy's, by `id`.
    """
    shared = {id(parameter): parameter for parameter in policy.parameters()}
    twin = copy.deepcopy(policy, {**shared, **(replaced or {})})
    return twin.unload() if isinstance(twin, PeftModel) else twin
