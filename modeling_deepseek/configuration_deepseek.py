"""The configuration: DeepSeek-V3's, and the settings this package adds.

The model files and every recipe read it; `save_pretrained` copies this file into checkpoints. Each added
setting's default leaves DeepSeek-V3 exactly as transformers has it, and a setting that is not built yet is refused
rather than ignored.
"""

import difflib
import math
import os
from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import DeepseekV3Config
from transformers.activations import ACT2FN

from .deepseek_v2 import settings_from_v2
from .fp8_checkpoint import adopt_fp8
from .presets import PRESETS

AUTO_MAP = {
    "AutoConfig": "configuration_deepseek.DeepseekConfig",
    "AutoModel": "modeling_deepseek.DeepseekModel",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    "AutoModelForSequenceClassification": "modeling_deepseek.DeepseekForSequenceClassification",
}

# What every configuration of transformers takes, beside its own fields.
_SETTINGS_OF_TRANSFORMERS = {
    "dtype",
    "attn_implementation",
    "experts_implementation",
    "num_labels",
    "id2label",
    "label2id",
    "problem_type",
}
_TRAINING_TERMS = (
    "router_bias_update_speed",
    "seq_aux_loss_coef",
    "router_z_loss_coef",
    "router_aux_loss_coef",
    "mtp_loss_coef",
)
_TOPK_METHODS = ("noaux_tc", "greedy", "group_limited_greedy")
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "max_position_embeddings",
)


class DeepseekConfig(DeepseekV3Config):
    """Holds the settings of a DeepSeek-style Mixture-of-Experts model.

    Everything of `transformers.DeepseekV3Config` applies. Added:

    Args:
        scoring_func: ``"sigmoid"`` (DeepSeek-V3) or ``"softmax"`` (linear gate, top-k, softmax over the top-k; with
            ``norm_topk_prob=False`` the softmax runs over all experts, as in DeepSeek-V2).
        topk_method: How groups of experts are chosen among `n_group`: ``"noaux_tc"`` by their two best experts, bias
            included (DeepSeek-V3); ``"group_limited_greedy"`` by the best one (DeepSeek-V2); ``"greedy"``: there is
            one group (V2-Lite).
        num_experts_per_tok: At most this many routed experts per token (article: 12).
        min_experts_per_tok: At least this many (article: 8). None means as many as `num_experts_per_tok`.
        expert_top_p: Experts of a token are kept, best first, until their share of its `num_experts_per_tok` best
            reaches this, in (0, 1]. Held fixed if given without a target; otherwise where steering starts.
        target_experts_per_tok: Mean number of experts per token that a PI controller holds by steering p. None,
            with no `expert_top_p` either, means halfway between the two bounds.
        router_key_dim: None for the linear gate; a number for attention of the token's query over learned expert
            keys of this width.
        router_bias_update_speed: Step of the aux-loss-free balancing bias (DeepSeek-V3: 0.001), applied by
            `ExpertBalanceCallback`. 0 leaves the bias alone. Loading a checkpoint sets it to 0 unless it is passed.
        seq_aux_loss_coef: Weight of the sequence-wise balance loss (DeepSeek-V3: 1e-4).
        router_z_loss_coef: Weight of the router's z-loss (ST-MoE: 1e-3).
        router_aux_loss_coef: Weight of `aux_loss`, the layers' mean sequence-wise balance loss, in the loss that the
            model returns for labels with `output_router_logits=True`. TRL's trainers set it under this name.
            `seq_aux_loss_coef` trains the same loss without asking for router logits.
        mtp_loss_coef: Weight of the multi-token prediction loss (DeepSeek-V3: 0.3). Above 0, the model has
            `num_nextn_predict_layers` more layers, trained on the labels, or without labels on the tokens themselves.
            Loading a checkpoint sets it to 0 unless it is passed; the layers' weights are then no part of the model,
            but written again with it.
        norm_type: ``"rmsnorm"`` or ``"layernorm"`` (article).
        hidden_dropout: Dropout on the output of each attention and feed-forward block, in [0, 1) (article: 0.1).

    Raises:
        ValueError: A setting is outside its range; the message names it, its value and the range.
    """

    model_type = "deepseek_moe"
    attribute_map = {**DeepseekV3Config.attribute_map, "num_experts": "n_routed_experts"}  # noqa: RUF012

    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    min_experts_per_tok: int | None = None
    expert_top_p: float | None = None
    target_experts_per_tok: float | None = None
    router_key_dim: int | None = None
    router_bias_update_speed: float = 0.0
    seq_aux_loss_coef: float = 0.0
    router_z_loss_coef: float = 0.0
    router_aux_loss_coef: float = 0.0
    mtp_loss_coef: float = 0.0
    norm_type: str = "rmsnorm"
    hidden_dropout: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "DeepseekConfig":
        """Return a named size, with some settings replaced.

        Args:
            name: ``"154b"``, ``"7.7b"``, ``"1b"``, ``"100m"``, ``"20m"``, ``"nano"`` (about 3 M) or ``"debug"``
                (under 1 M).
            **overrides: Settings to replace, for example ``vocab_size``.

        Raises:
            ValueError: There is no preset or no setting of that name.

        Example:
            >>> DeepseekConfig.from_preset("nano", vocab_size=1024).hidden_size
            128
        """
        if name not in PRESETS:
            raise ValueError(f"preset: got {name!r}, expected one of {', '.join(PRESETS)}")
        known = set(cls().to_dict()) | set(cls.attribute_map) | _SETTINGS_OF_TRANSFORMERS
        for key in overrides.keys() - known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"{key}: no such setting" + (f"; did you mean {near[0]}?" if near else ""))
        settings = dict(PRESETS[name])
        if overrides.keys() & {"min_experts_per_tok", "num_experts_per_tok"}:
            settings.pop("target_experts_per_tok", None)  # It belongs to the preset's own bounds.
        try:
            return cls(**{**settings, **overrides})
        except StrictDataclassFieldValidationError as error:
            raise ValueError(_one_line(error)) from None

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a checkpoint's settings, taking DeepSeek-V3's and V2's own for ours.

        Args:
            pretrained_model_name_or_path: As for `transformers.PreTrainedConfig.get_config_dict`.
            **kwargs: Likewise.

        Raises:
            ValueError: The checkpoint is of another model type, or a V2 with settings that are not computed here.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type == "deepseek_v3":
            # Its auto_map, if any, names DeepSeek's remote code.
            config_dict = {key: value for key, value in config_dict.items() if key != "auto_map"}
            config_dict["model_type"] = cls.model_type
        elif model_type == "deepseek_v2":
            config_dict = {**settings_from_v2(config_dict), "model_type": cls.model_type}
        elif model_type != cls.model_type:
            raise ValueError(f"model_type: got {model_type!r}, expected {cls.model_type}, deepseek_v3 or deepseek_v2")
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "DeepseekConfig":
        """Make a configuration from saved settings, with balancing and MTP loss off unless `kwargs` asks for them.

        A finished model's bias is part of how it routes; fine-tuning moves it only on request. The layers for
        multi-token prediction are of no use outside training: transformers' `generate(use_mtp=True)` reads its own,
        and the model carries the checkpoint's to the next one (`carried_mtp.py`).

        Args:
            config_dict: The settings.
            **kwargs: As for `transformers.PreTrainedConfig.from_dict`.
        """
        # Here and not in get_config_dict, which the Auto classes pass by.
        settings = adopt_fp8({**config_dict, **dict.fromkeys(_TRAINING_TERMS, 0.0)})
        try:
            return super().from_dict(settings, **kwargs)
        except StrictDataclassFieldValidationError as error:
            raise ValueError(_one_line(error)) from None

    @property
    def has_dynamic_experts(self) -> bool:
        """True if tokens may use different numbers of experts."""
        return self.min_experts_per_tok is not None and self.min_experts_per_tok < self.num_experts_per_tok

    @property
    def num_mtp_modules(self) -> int:
        """How many multi-token prediction layers the model holds."""
        return self.num_nextn_predict_layers if self.mtp_loss_coef > 0 else 0

    @property
    def mean_experts_target(self) -> float | None:
        """The mean number of experts per token that p is steered to; None where p is fixed or unused."""
        if not self.has_dynamic_experts:
            return None
        if self.target_experts_per_tok is None and self.expert_top_p is None:
            return (self.min_experts_per_tok + self.num_experts_per_tok) / 2
        return self.target_experts_per_tok

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the configuration, naming every class a checkpoint can be loaded as.

        `PreTrainedModel.save_pretrained` names only the class being saved; the reward and value models of a policy
        are read from the policy's own checkpoint.

        Args:
            save_directory: The folder.
            **kwargs: As for `transformers.PreTrainedConfig.save_pretrained`.
        """
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)

    def check(self) -> None:
        """Raise ValueError, in one line, at the first setting outside its range.

        Runs at construction and again when a model is built, because `from_pretrained(path, some_setting=...)` sets
        attributes after construction.
        """
        self._check_sizes()
        self._check_experts()
        self._check_dynamic_experts()
        self._check_training_terms()
        _require(self.hidden_act in ACT2FN, "hidden_act", self.hidden_act, "an activation that transformers knows")
        _require(self.norm_type in ("rmsnorm", "layernorm"), "norm_type", self.norm_type, "rmsnorm or layernorm")
        _require(
            _is_number(self.hidden_dropout) and 0 <= self.hidden_dropout < 1,
            "hidden_dropout",
            self.hidden_dropout,
            "a number in [0, 1)",
        )

    def _check_sizes(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            _require(_is_integer(value) and value >= 1, name, value, "a whole number of at least 1")
        for name in ("q_lora_rank", "router_key_dim"):
            value = getattr(self, name)
            _require(value is None or (_is_integer(value) and value >= 1), name, value, "None or at least 1")
        for name in ("first_k_dense_replace", "num_nextn_predict_layers"):
            value = getattr(self, name)
            _require(_is_integer(value) and value >= 0, name, value, "a whole number of at least 0")
        _require(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", self.qk_rope_head_dim, "an even number")
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            self.num_key_value_heads,
            f"a divisor of num_attention_heads={self.num_attention_heads}",
        )

    def _check_experts(self) -> None:
        _require(self.scoring_func in ("sigmoid", "softmax"), "scoring_func", self.scoring_func, "sigmoid or softmax")
        experts, k = self.n_routed_experts, self.num_experts_per_tok
        _require(k <= experts, "num_experts_per_tok", k, f"at most n_routed_experts={experts}")
        groups, chosen = self.n_group, self.topk_group
        _require(
            _is_integer(groups) and groups >= 1 and experts % groups == 0,
            "n_group",
            groups,
            f"a divisor of n_routed_experts={experts}",
        )
        method = self.topk_method
        _require(method in _TOPK_METHODS, "topk_method", method, f"one of {', '.join(_TOPK_METHODS)}")
        _require(method != "greedy" or groups == 1, "n_group", groups, "1 with topk_method='greedy'")
        _require(
            method != "noaux_tc" or experts // groups >= 2,
            "n_group",
            groups,
            f"groups of at least 2 of n_routed_experts={experts}",
        )
        _require(_is_integer(chosen) and 1 <= chosen <= groups, "topk_group", chosen, f"in 1..n_group={groups}")
        reachable = experts // groups * chosen
        _require(k <= reachable, "num_experts_per_tok", k, f"at most the {reachable} experts of topk_group={chosen}")

    def _check_dynamic_experts(self) -> None:
        low, high = self.min_experts_per_tok, self.num_experts_per_tok
        _require(low is None or (_is_integer(low) and low >= 1), "min_experts_per_tok", low, "None or at least 1")
        _require(low is None or low <= high, "min_experts_per_tok", low, f"at most num_experts_per_tok={high}")
        p, target = self.expert_top_p, self.target_experts_per_tok
        _require(p is None or (_is_number(p) and 0 < p <= 1), "expert_top_p", p, "None or in (0, 1]")
        varies = low is not None and low < high
        _require(p is None or varies, "expert_top_p", p, "None unless min_experts_per_tok < num_experts_per_tok")
        if target is not None:
            low = high if low is None else low
            _require(
                _is_number(target) and low <= target <= high,
                "target_experts_per_tok",
                target,
                f"in [min_experts_per_tok, num_experts_per_tok] = [{low}, {high}]",
            )

    def _check_training_terms(self) -> None:
        for name in _TRAINING_TERMS:
            value = getattr(self, name)
            _require(_is_number(value) and value >= 0, name, value, "a number of at least 0")
        depths = self.num_nextn_predict_layers
        _require(
            self.mtp_loss_coef == 0 or depths > 0, "num_nextn_predict_layers", depths, "1 or more with mtp_loss_coef"
        )


def _one_line(error: StrictDataclassFieldValidationError) -> str:
    return " ".join(str(error.__cause__ or error).split())


def _require(holds: bool, name: str, value: Any, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name}: got {value!r}, expected {allowed}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
