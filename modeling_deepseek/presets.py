"""The named model sizes, as overrides of `DeepseekConfig`'s defaults.

`DeepseekConfig.from_preset` reads this table. The two large ones follow the article: a linear gate with softmax over
the chosen experts, 8 to 12 of 128 experts per token, LayerNorm, dropout 0.1. All balance their experts, for without
it a router trained from scratch collapses onto a few of them. The two small ones are shaped for a CPU and
take their vocabulary from the tokenizer that comes with them: pass ``vocab_size``.
"""

from typing import Any

_ARTICLE: dict[str, Any] = {
    "scoring_func": "softmax",
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
    # DeepSeek-V3's. Loading a checkpoint sets both to 0.
    "router_bias_update_speed": 0.001,
    "seq_aux_loss_coef": 1e-4,
}

PRESETS: dict[str, dict[str, Any]] = {
    # 154.1e9 parameters, 24.2 % of them active at 12 experts per token (counted on the meta device by a test).
    "154b": {
        **_ARTICLE,
        "hidden_size": 7168,
        "num_hidden_layers": 64,
        "first_k_dense_replace": 3,
        "intermediate_size": 18432,
        "moe_intermediate_size": 768,
        "n_routed_experts": 128,
        "n_shared_experts": 10,
        "num_experts_per_tok": 12,
        "min_experts_per_tok": 8,
        "target_experts_per_tok": 10.0,
        "norm_type": "layernorm",
        "hidden_dropout": 0.1,
    },
    # 7.69e9 parameters; a slice of the larger one, from which `distill` can cut it.
    "7.7b": {
        **_ARTICLE,
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "first_k_dense_replace": 1,
        "intermediate_size": 10944,
        "moe_intermediate_size": 640,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": 1024,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "min_experts_per_tok": 4,
        "target_experts_per_tok": 5.0,
        "norm_type": "layernorm",
        "hidden_dropout": 0.1,
    },
    # About 3e6 parameters at 2,048 tokens of vocabulary. V3's router; no dropout, for a run this short never overfits.
    "nano": {
        "vocab_size": 2048,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "intermediate_size": 384,
        "moe_intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 64,
        # Query and value heads equally wide: only then does torch's attention on a CPU take its fast path.
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "min_experts_per_tok": 2,
        "target_experts_per_tok": 3.0,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "router_bias_update_speed": 0.01,  # ten times V3's: hundreds of steps, not hundreds of thousands
        "max_position_embeddings": 1024,
        "num_nextn_predict_layers": 0,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    },
    # Under 1e6 parameters: for tests and for a recipe's dry run.
    "debug": {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "intermediate_size": 128,
        "moe_intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "min_experts_per_tok": 1,
        "target_experts_per_tok": 2.0,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "router_bias_update_speed": 0.01,  # ten times V3's: hundreds of steps, not hundreds of thousands
        "max_position_embeddings": 512,
        "num_nextn_predict_layers": 0,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    },
}
