"""The model: transformers' DeepSeek-V3, and what this package adds to it.

`modeling_deepseek/__init__.py` registers the classes; `save_pretrained` copies this file and its siblings into every
checkpoint. Read beside `transformers/models/deepseek_v3/modeling_deepseek_v3.py`: only differences are stated here.
Surprising: padding is told to the routers (`layout`), not to keep it from being routed but from being counted.

The experts are transformers' own; transformers lets `experts_implementation` be set only where it finds the words
@use_experts_implementation in the model's file.
"""

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3DecoderLayer,
    DeepseekV3Experts,
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3MLP,
    DeepseekV3Model,
    DeepseekV3MoE,
    DeepseekV3PreTrainedModel,
    DeepseekV3RMSNorm,
    DeepseekV3RotaryEmbedding,
)
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
from .conversion import fuse_expert_names, register_conversion
from .fp8_checkpoint import METHOD
from .routing import DeepseekRouter
from .token_layout import TokenLayout, make_layout

register_conversion(DeepseekConfig.model_type)


def make_norm(config: DeepseekConfig, size: int, eps: float) -> nn.Module:
    """Return the normalisation that `norm_type` names.

    Args:
        config: The model's configuration.
        size: Width of the last axis.
        eps: Added to the variance.
    """
    return nn.LayerNorm(size, eps=eps) if config.norm_type == "layernorm" else DeepseekV3RMSNorm(size, eps=eps)


class DeepseekMoE(DeepseekV3MoE):
    """Adds our router to DeepSeek-V3's mixture of routed and shared experts."""

    def __init__(self, config: DeepseekConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.experts = DeepseekV3Experts(config)
        self.experts.register_load_state_dict_pre_hook(fuse_expert_names)
        self.gate = DeepseekRouter(config)
        self.shared_experts = DeepseekV3MLP(config, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, hidden_states: torch.Tensor, layout: TokenLayout | None = None) -> torch.Tensor:
        """Return the experts' weighted sum plus the shared experts, `[B, S, D]`.

        Args:
            hidden_states: `[B, S, D]`.
            layout: Sequences and padding; None: neither is known.
        """
        # Under expert parallelism transformers looks up the process that has an expert, also where its weight is 0.
        is_split = vars(self.experts).get("_is_expert_parallel", False)  # a flag that 5.17 has not
        _, topk_weights, topk_indices = self.gate(hidden_states, layout, marks_unused=not is_split)
        routed = self.experts(hidden_states.view(-1, hidden_states.shape[-1]), topk_indices, topk_weights)
        return routed.view_as(hidden_states) + self.shared_experts(hidden_states)


class DeepseekAttention(DeepseekV3Attention):
    """Lets `norm_type` choose the normalisation of the latents."""

    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.norm_type == "layernorm":
            # 1e-6 is what DeepSeek-V3's latent norms use, whatever rms_norm_eps says.
            self.kv_a_layernorm = make_norm(config, config.kv_lora_rank, 1e-6)
            if config.q_lora_rank is not None:
                self.q_a_layernorm = make_norm(config, config.q_lora_rank, 1e-6)


class DeepseekDecoderLayer(DeepseekV3DecoderLayer):
    """Adds dropout on both branches, and hands `layout` to the router."""

    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        # Not DeepseekV3DecoderLayer's constructor: it would allocate the experts twice.
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = DeepseekAttention(config, layer_idx)
        self.is_moe = layer_idx >= config.first_k_dense_replace
        self.mlp = DeepseekMoE(config) if self.is_moe else DeepseekV3MLP(config)
        self.input_layernorm = make_norm(config, config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = make_norm(config, config.hidden_size, config.rms_norm_eps)
        # Identity draws no random numbers, so a run without dropout matches transformers' own.
        self.dropout = nn.Dropout(config.hidden_dropout) if config.hidden_dropout > 0 else nn.Identity()

    def forward(self, hidden_states: torch.Tensor, layout: TokenLayout | None = None, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output, `[B, S, D]`.

        Args:
            hidden_states: `[B, S, D]`.
            layout: Sequences and padding; None: neither is known.
            **kwargs: As for `DeepseekV3DecoderLayer`.
        """
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + self.dropout(self.mlp(normed, layout) if self.is_moe else self.mlp(normed))


def ignored_mtp_keys(config: DeepseekConfig) -> list[str]:
    """Return patterns of checkpoint keys of multi-token prediction layers that the model has no place for.

    All of them if the layers are not built; else their copies of embedding and head, which are the model's own.

    Args:
        config: The model's configuration.
    """
    first = config.num_hidden_layers
    part = r"(embed_tokens|shared_head\.head)\." if config.num_mtp_modules else ""
    return [rf"layers\.{first + depth}\.{part}" for depth in range(config.num_nextn_predict_layers)]


class DeepseekSharedHead(nn.Module):
    """The norm before the head that a multi-token prediction layer shares with the model; named as in checkpoints."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.norm = make_norm(config, config.hidden_size, config.rms_norm_eps)


class DeepseekMtpLayer(DeepseekDecoderLayer):
    """Multi-token prediction: one more layer, fed with what came before and the embedding of one more token.

    For depth k: `h' = block(eh_proj([enorm(embed(x_{i+k})), hnorm(h_i)]))`, and `head(norm(h'))` predicts x_{i+k+1}.

    Reference:
        DeepSeek-AI 2024, arXiv 2412.19437, section 2.2. The order of the two halves is the released weights'.
    """

    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.enorm = make_norm(config, config.hidden_size, config.rms_norm_eps)
        self.hnorm = make_norm(config, config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = DeepseekSharedHead(config)

    def forward(self, hidden_states: torch.Tensor, inputs_embeds: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return hidden states for the head and for the next depth, `[B, S, D]`.

        Args:
            hidden_states: `[B, S, D]`, of the model or of the depth before.
            inputs_embeds: `[B, S, D]`, embeddings k tokens ahead.
            **kwargs: As for `DeepseekDecoderLayer`.
        """
        joined = torch.cat([self.enorm(inputs_embeds), self.hnorm(hidden_states)], dim=-1)
        return self.shared_head.norm(super().forward(self.eh_proj(joined), **kwargs))


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
        if state_dict is None and checkpoint_files and checkpoint_files[0].endswith(".safetensors"):
            model._read_checkpoint(checkpoint_files, load_config)
        loaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        source = load_config.pretrained_model_name_or_path or "the state dict"
        refuse_missing(model._unexplained(set(loaded[0].missing_keys)), source)
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
        # Another quantiser stores other shapes.
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
        self._weight_conversions = None  # Else transformers writes back the layout that it read.
        # transformers copies the file that holds the class. FSDP2 makes a class of its own, in a file of torch's.
        self.__module__ = next(cls.__module__ for cls in type(self).__mro__ if not cls.__module__.startswith("torch."))
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


class DeepseekModel(DeepseekPreTrainedModel, DeepseekV3Model):
    """The decoder without a head.

    The constructors below call `PreTrainedModel`'s: DeepSeek-V3's would build its own layers first.
    """

    def __init__(self, config: DeepseekConfig) -> None:
        config.check()
        PreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
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
        self._owner = None
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
        if self.training:
            tokens = kwargs["inputs_embeds"] if input_ids is None else input_ids
            position_ids = kwargs.get("position_ids")
            if kwargs.get("use_cache") is None:
                # With a cache, transformers does not keep packed sequences apart.
                kwargs["use_cache"] = False
            kwargs["layout"] = make_layout(tokens.shape[:2], tokens.device, attention_mask, position_ids)
        labels = kwargs.pop("mtp_labels", None)
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        # Without a language-modelling head (classifiers, the bare decoder) there is nothing to predict tokens with.
        predicts = self.config.num_mtp_modules and self._owner is not None and input_ids is not None
        if self.training and predicts and torch.is_grad_enabled():
            loss = self._mtp_loss(output.last_hidden_state, input_ids, labels, attention_mask, kwargs)
            loss = loss * (self.config.mtp_loss_coef * self.layers[-1].mlp.gate.load.loss_scale)
            output.last_hidden_state = AttachLoss.apply(output.last_hidden_state, loss)
        return output

    def _mtp_loss(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None,
        labels: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Mean over depths and sequences of the cross-entropy k + 1 tokens ahead, never across a sequence's end."""
        position_ids, layout = kwargs.get("position_ids"), kwargs["layout"]
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        ids = layout.sequence_ids.view_as(input_ids)
        labels = input_ids if labels is None else labels
        common = {"position_ids": position_ids, "layout": layout}
        common["attention_mask"] = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=position_ids,
        )
        common["position_embeddings"] = self.rotary_emb(hidden_states, position_ids)
        losses = []
        for depth, layer in enumerate(self.layers[self.config.num_hidden_layers :], start=1):
            hidden_states = layer(hidden_states, self.embed_tokens(input_ids.roll(-depth, 1)), **common)
            targets = labels.roll(-depth - 1, 1)
            is_valid = (ids == ids.roll(-depth - 1, 1)) & (ids >= 0) & (targets != -100)
            is_valid[:, -depth - 1 :] = False
            logits = self.head(hidden_states[is_valid]).float()
            token_losses = logits.new_zeros(is_valid.numel(), 1)
            token_losses[is_valid.flatten(), 0] = nn.functional.cross_entropy(
                logits, targets[is_valid], reduction="none"
            )
            # By sequence first, as the paper does: a mean over all tokens would depend on how a batch is divided.
            predicting = layout._replace(sequence_ids=layout.sequence_ids.masked_fill(~is_valid.flatten(), -1))
            losses.append(layout.mean_over_sequences(predicting.mean(token_losses).squeeze(1)))
        return torch.stack(losses).mean()

    @property
    def head(self) -> nn.Module:
        """The language-modelling head of the model that this one is part of."""
        return self._owner[0].get_output_embeddings()


class DeepseekForCausalLM(DeepseekPreTrainedModel, DeepseekV3ForCausalLM):
    """The decoder with a language-modelling head."""

    def __init__(self, config: DeepseekConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # In a tuple, or the decoder would list its owner among its own modules.
        self.model._owner = (self,)
        self._keys_to_ignore_on_load_unexpected = ignored_mtp_keys(config)
        self.post_init()

    @functools.wraps(DeepseekV3ForCausalLM.forward)
    def forward(
        self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> MoeCausalLMOutputWithPast:
        """Return logits and loss, as `DeepseekV3ForCausalLM` does, and with the router logits also `aux_loss`.

        Args:
            input_ids: `[B, S]`.
            attention_mask: As in transformers.
            **kwargs: As for `DeepseekV3ForCausalLM`.
        """
        if self.training and self.config.num_mtp_modules:
            kwargs["mtp_labels"] = kwargs.get("labels")
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if isinstance(output, MoeCausalLMOutputWithPast) and output.router_logits is not None:
            output.aux_loss = self._mean_balance_loss(output.router_logits, attention_mask)
        return output

    def _get_candidate_generator(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Say in one line where `use_mtp` cannot draft: transformers reads the layers from a checkpoint."""
        if generation_config.use_mtp and (self.config.num_mtp_modules or not self.config.name_or_path):
            raise ValueError(
                "use_mtp: True is not allowed for a model that trains multi-token prediction or was never saved, want "
                "one loaded by from_pretrained without mtp_loss_coef"
            )
        return super()._get_candidate_generator(generation_config, *args, **kwargs)

    @torch.no_grad()
    def _mean_balance_loss(
        self, router_logits: Sequence[torch.Tensor], attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The layers' mean balance loss, for the logs of trainers that expect one; its gradient is in the layers."""
        routers = [layer.mlp.gate for layer in self.model.layers[: self.config.num_hidden_layers] if layer.is_moe]
        layout = None
        if routers and isinstance(attention_mask, torch.Tensor) and len(router_logits[0]) == attention_mask.numel():
            layout = make_layout(attention_mask.shape, attention_mask.device, attention_mask, None)
        losses = [router.balance_loss(row, layout) for router, row in zip(routers, router_logits, strict=True)]
        return torch.stack(losses).mean() if losses else torch.zeros((), device=self.device)


class DeepseekForSequenceClassification(DeepseekPreTrainedModel, DeepseekV3ForSequenceClassification):
    """The decoder with a score head on the last token that is not padding: a reward or value model."""

    _carries_mtp = False

    def __init__(self, config: DeepseekConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = DeepseekModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()
