"""The model: transformers' DeepSeek-V3, and what this package adds to it.

`modeling_deepseek/__init__.py` registers the classes; `save_pretrained` copies this file and its siblings into every
checkpoint. Read beside `transformers/models/deepseek_v3/modeling_deepseek_v3.py`: only differences are stated here and
in `decoder_layer.py`.

The experts are transformers' own; transformers lets `experts_implementation` be set only where it finds the words
@use_experts_implementation in the model's file.
"""

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3Model,
    DeepseekV3PreTrainedModel,
    DeepseekV3RotaryEmbedding,
)
from transformers.utils import logging
from transformers.utils.output_capturing import OutputRecorder

from .auxiliary_loss import AttachLoss
from .carried_mtp import mtp_part, read_carried, with_carried
from .checkpoint_check import (
    check_index,
    check_scales,
    check_shapes,
    check_tensors,
    read_headers,
    refuse_fp8,
    refuse_missing,
)
from .configuration_deepseek import DeepseekConfig
from .conversion import register_conversion
from .decoder_layer import DeepseekAttention, DeepseekDecoderLayer, make_norm
from .fp8_checkpoint import METHOD
from .mtp import DeepseekMtpLayer, PredictionInputs, ignored_mtp_keys, prediction_loss
from .routing import DeepseekRouter
from .token_layout import make_layout
from .training_pass import PassWeight, TrainingPass

logger = logging.get_logger(__name__)

register_conversion(DeepseekConfig.model_type)


class DeepseekPreTrainedModel(DeepseekV3PreTrainedModel):
    """Names our configuration and layers to transformers."""

    config: DeepseekConfig
    config_class = DeepseekConfig
    _no_split_modules = ["DeepseekDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": DeepseekDecoderLayer,
        "attentions": DeepseekAttention,
        "router_logits": OutputRecorder(DeepseekRouter, index=0),
    }
    _keep_in_fp32_modules_strict = ["e_score_correction_bias", "share.state"]  # noqa: RUF012

    # What a checkpoint holds of multi-token prediction and this kind of model has no layers for.
    _carries_mtp = True
    _carried_mtp: dict[str, torch.Tensor] = {}  # noqa: RUF012

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("torch."):
            # FSDP2 makes a class of its own; save_pretrained copies the file that holds the class, so name ours.
            cls.__module__ = next(base.__module__ for base in cls.__mro__ if not base.__module__.startswith("torch."))

    @classmethod
    @functools.wraps(PreTrainedModel.from_pretrained.__func__)
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> "DeepseekPreTrainedModel":
        """Load a checkpoint as `transformers.PreTrainedModel.from_pretrained` does, its index checked before.

        Args:
            pretrained_model_name_or_path: A folder or a Hub id.
            *model_args: As for `transformers.PreTrainedModel.from_pretrained`.
            **kwargs: Likewise.

        Raises:
            ValueError: The index of the shards is damaged or contradicts itself.
        """
        if pretrained_model_name_or_path is not None:
            check_index(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @staticmethod
    def _load_pretrained_model(
        model: "DeepseekPreTrainedModel",
        state_dict: dict[str, Any] | None,
        checkpoint_files: list[str] | None,
        load_config: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Check the files before, and what came of them after, transformers' own loading."""
        if model._hf_peft_config_loaded:  # an adapter's weights, not a whole checkpoint
            return PreTrainedModel._load_pretrained_model(
                model, state_dict, checkpoint_files, load_config, *args, **kwargs
            )
        if state_dict is None and checkpoint_files and checkpoint_files[0].endswith(".safetensors"):
            model._read_checkpoint(checkpoint_files, load_config)
        loaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        source = load_config.pretrained_model_name_or_path or "the state dict"
        refuse_missing(model._unexplained(set(loaded[0].missing_keys)), source)
        model._weight_conversions = None  # else saving writes back the layout that was read
        return loaded

    def _read_checkpoint(self, checkpoint_files: list[str] | None, load_config: Any) -> None:
        tensors = read_headers(checkpoint_files)
        weight_map = (load_config.sharded_metadata or {}).get("weight_map", {})
        check_tensors(tensors, weight_map, self.config.n_routed_experts)
        quantization = load_config.hf_quantizer and load_config.hf_quantizer.quantization_config
        block_size = None
        if quantization is None:
            refuse_fp8(tensors)
        elif quantization.quant_method == METHOD:
            block_size = tuple(quantization.weight_block_size)
            check_scales(tensors, block_size)
        # Another quantizer stores other shapes.
        if (quantization is None or block_size) and not load_config.ignore_mismatched_sizes:
            # Under DeepSpeed's ZeRO-3 a parameter is empty here and has its whole shape beside it.
            shapes = {name: getattr(t, "ds_shape", t.shape) for name, t in self.state_dict(keep_vars=True).items()}
            check_shapes(tensors, shapes)
        if self._carries_mtp and not self.config.num_mtp_modules:
            self._carried_mtp = read_carried(tensors, self.config, load_config.dtype, block_size)

    def _unexplained(self, missing: set[str]) -> set[str]:
        """Those of the tensors missing in a checkpoint that nobody asked to begin anew."""
        missing = missing - self.all_tied_weights_keys.keys()
        begun = {name for name in self.state_dict() if mtp_part(name, self.config) is not None}
        if begun <= missing:  # mtp_loss_coef was passed for a checkpoint without such layers.
            missing = missing - begun
        return {
            name for name in missing if not any(re.search(part, name) for part in self._keys_to_ignore_on_load_missing)
        }

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write a checkpoint with the official per-expert names, also where the model was loaded from fused ones.

        Multi-token prediction weights of the checkpoint it was loaded from are written again.

        Args:
            save_directory: The folder.
            **kwargs: As for `transformers.PreTrainedModel.save_pretrained`.
        """
        if self._carried_mtp and not getattr(self, "_hf_peft_config_loaded", False):
            state_dict = kwargs.get("state_dict")
            state_dict = self.state_dict() if state_dict is None else state_dict
            prefix = "" if self.base_model is self else f"{self.base_model_prefix}."
            kwargs["state_dict"] = with_carried(state_dict, self._carried_mtp, prefix, self.dtype)
        super().save_pretrained(save_directory, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, DeepseekRouter):
            module.init_weights(self.config.initializer_range)
        else:
            super()._init_weights(module)


def padding_row(config: DeepseekConfig) -> int | None:
    """Return the row of the embedding that stays 0 and untrained; None where padding is written as the end or begin.

    Args:
        config: The configuration.
    """
    end = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return None if config.pad_token_id in (*end, config.bos_token_id) else config.pad_token_id


class DeepseekModel(DeepseekPreTrainedModel, DeepseekV3Model):
    """The decoder without a head.

    The constructors below call `PreTrainedModel`'s: DeepSeek-V3's would build its own layers first.

    Args:
        config: The configuration.
        get_head: Returns the language-modeling head that the prediction layers share. None where there is none, as in
            a classifier: then they are not trained.

    Attributes:
        pass_weight: What part of a step's auxiliary losses a forward pass bears.
    """

    def __init__(self, config: DeepseekConfig, get_head: Callable[[], nn.Module] | None = None) -> None:
        config.check()
        PreTrainedModel.__init__(self, config)
        self.padding_idx = padding_row(config)
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        # Multi-token prediction layers follow the last one, as in the released checkpoints.
        depths = range(config.num_hidden_layers, config.num_hidden_layers + config.num_mtp_modules)
        self.layers = nn.ModuleList(
            [DeepseekDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
            + [DeepseekMtpLayer(config, i) for i in depths]
        )
        self.norm = make_norm(config, config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = DeepseekV3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.pass_weight = PassWeight()
        self.get_head = get_head
        self._keys_to_ignore_on_load_unexpected = ignored_mtp_keys(config)
        if config.topk_method != "noaux_tc":
            self._keys_to_ignore_on_load_missing = [r"\.gate\.e_score_correction_bias$"]  # DeepSeek-V2 has none.
        self.post_init()

    @functools.wraps(DeepseekV3Model.forward)  # Trainer and generate read the arguments' names.
    def forward(
        self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> MoeModelOutputWithPast:
        """Return hidden states, as `DeepseekV3Model` does.

        Args:
            input_ids: `[B, S]`.
            attention_mask: As in transformers. A 2-D one also tells the routers what is padding.
            **kwargs: As for `DeepseekV3Model`.
        """
        labels = kwargs.pop("mtp_labels", None)
        if not self.training:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if kwargs.get("use_cache") is None:
            kwargs["use_cache"] = False  # with a cache, transformers does not keep packed sequences apart
        tokens = kwargs["inputs_embeds"] if input_ids is None else input_ids
        return_dict = kwargs.pop("return_dict", None)
        training_pass = self._begin_pass(tokens, attention_mask, kwargs.get("position_ids"))
        output = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, training_pass=training_pass, **kwargs
        )
        predicts = self.config.num_mtp_modules and self.get_head is not None and input_ids is not None
        if predicts and torch.is_grad_enabled():
            inputs = PredictionInputs(
                input_ids=input_ids,
                labels=input_ids if labels is None else labels,
                attention_mask=attention_mask,
                position_ids=kwargs.get("position_ids"),
                training_pass=training_pass,
            )
            loss = prediction_loss(self, self.get_head(), output.last_hidden_state, inputs)
            loss = loss * (self.config.mtp_loss_coef * training_pass.loss_weight)
            output.last_hidden_state = AttachLoss.apply(output.last_hidden_state, loss)
        return output.to_tuple() if return_dict is False else output

    def _begin_pass(
        self, tokens: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> TrainingPass:
        layout = make_layout(tokens.shape[:2], tokens.device, attention_mask, position_ids)
        if not torch.is_grad_enabled():  # a rollout, or the reference of a preference loss
            return TrainingPass(layout)
        if self.pass_weight.num_passes is None and not torch.compiler.is_compiling():
            self._warn_of_missing_callback()
        return TrainingPass(layout, self.pass_weight.take())

    def _warn_of_missing_callback(self) -> None:
        config, still = self.config, []
        if config.router_bias_update_speed > 0:
            still.append(f"router_bias_update_speed={config.router_bias_update_speed}: the balancing bias")
        if config.mean_experts_target is not None:
            still.append(f"target_experts_per_tok={config.mean_experts_target}: the expert share p")
        for setting in still:
            logger.warning_once(f"{setting} stays as it is without ExpertBalanceCallback; pass one to the trainer")


class DeepseekForCausalLM(DeepseekPreTrainedModel, DeepseekV3ForCausalLM):
    """The decoder with a language-modeling head."""

    def __init__(self, config: DeepseekConfig) -> None:
        PreTrainedModel.__init__(self, config)
        # A bound method, so that the decoder knows the head without listing it among its own modules.
        self.model = DeepseekModel(config, get_head=self.get_output_embeddings)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._keys_to_ignore_on_load_unexpected = ignored_mtp_keys(config)
        self.post_init()

    @functools.wraps(DeepseekV3ForCausalLM.forward)
    def forward(
        self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> MoeCausalLMOutputWithPast:
        """Return logits and loss, as `DeepseekV3ForCausalLM` does, and with the router logits also `aux_loss`.

        `aux_loss` is the layers' mean sequence-wise balance loss, with a gradient: TRL's trainers weigh it by their
        `router_aux_loss_coef`. With labels, `router_aux_loss_coef` of the configuration adds it to the loss.

        Args:
            input_ids: `[B, S]`.
            attention_mask: As in transformers.
            **kwargs: As for `DeepseekV3ForCausalLM`.
        """
        if self.training and self.config.num_mtp_modules:
            kwargs["mtp_labels"] = kwargs.get("labels")
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if isinstance(output, MoeCausalLMOutputWithPast) and output.router_logits is not None:
            output.aux_loss = self._mean_balance_loss(output.router_logits, attention_mask, kwargs.get("position_ids"))
            if output.loss is not None and self.config.router_aux_loss_coef > 0:
                # Trainer divides a loss by the passes of a step only where it does not pass num_items_in_batch.
                num_passes = self.model.pass_weight.num_passes or 1
                share = 1 if kwargs.get("num_items_in_batch") is None else 1 / num_passes
                output.loss = output.loss + self.config.router_aux_loss_coef * share * output.aux_loss
        return output

    def _get_candidate_generator(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Say in one line where `use_mtp` cannot draft: transformers reads the layers from a checkpoint."""
        if generation_config.use_mtp and (self.config.num_mtp_modules or not self.config.name_or_path):
            raise ValueError(
                "use_mtp: True is not allowed for a model that trains multi-token prediction or was never saved, "
                "expected one loaded by from_pretrained without mtp_loss_coef"
            )
        conversions = getattr(self, "_weight_conversions", None)
        if conversions is None:  # transformers 5.17 takes what is attached; later versions do this themselves
            self._weight_conversions = get_model_conversion_mapping(self)
        try:
            return super()._get_candidate_generator(generation_config, *args, **kwargs)
        finally:
            self._weight_conversions = conversions

    def _mean_balance_loss(
        self,
        router_logits: tuple[torch.Tensor, ...],
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        routers = [layer.mlp.gate for layer in self.model.layers[: self.config.num_hidden_layers] if layer.is_moe]
        if not routers:
            return torch.zeros((), device=self.device)
        trains = self.training and torch.is_grad_enabled() and any(p.requires_grad for p in routers[-1].parameters())
        if trains and not router_logits[-1].requires_grad:
            logger.warning_once(
                "aux_loss: it has no gradient, for reentrant checkpointing records router logits without one; pass "
                "use_reentrant=False, or set seq_aux_loss_coef, which trains under either kind"
            )
        layout = None
        if isinstance(attention_mask, torch.Tensor) and len(router_logits[0]) == attention_mask.numel():
            layout = make_layout(attention_mask.shape, attention_mask.device, attention_mask, position_ids)
        losses = [router.balance_loss(row, layout) for router, row in zip(routers, router_logits, strict=True)]
        return torch.stack(losses).mean()


class DeepseekForSequenceClassification(DeepseekPreTrainedModel, DeepseekV3ForSequenceClassification):
    """The decoder with a score head on the last token that is not padding: a reward or value model."""

    _carries_mtp = False

    def __init__(self, config: DeepseekConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = DeepseekModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()
