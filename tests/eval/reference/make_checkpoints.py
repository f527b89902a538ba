"""Writes the three witness checkpoints beside this file. Run once; the result is committed.

    python tests/eval/reference/make_checkpoints.py

One of ours, trained for a minute on the development questions so that its answers are decided and not a coin's; a
random Llama-style and a random V3-style one. All share a tokenizer of 1,024 tokens, which makes prompts long enough
for some to be cut. Weights are stored in bfloat16, whose values float32 holds exactly.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from deepseek_eval.tasks import mmlu
from deepseek_eval.tasks.rows import read_rows
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

HERE = Path(__file__).resolve().parent
CONTEXT = 1536
TOKENS = {"vocab_size": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MOE = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    **TOKENS,
}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS["vocab_size"],
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=CONTEXT
    )


def train(model, tokenizer, texts: list[str], num_steps: int = 300) -> None:
    tokens = torch.tensor([token for text in texts for token in [1, *tokenizer.encode(text, verbose=False)]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(num_steps):
        starts = torch.randint(len(tokens) - 129, (16,), generator=generator)
        batch = torch.stack([tokens[start : start + 128] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}")


def main() -> None:
    shots = [f"{mmlu.format_question(row)} {mmlu.LETTERS[row['answer']]}\n\n" for row in read_rows("mmlu_dev")]
    code = [row["prompt"] + row["canonical_solution"] for row in read_rows("humaneval")]
    tokenizer = train_tokenizer(shots + code)
    torch.manual_seed(0)
    ours = DeepseekForCausalLM(DeepseekConfig(**MOE))
    train(ours, tokenizer, shots)
    torch.manual_seed(1)
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            initializer_range=0.2,
            **TOKENS,
        )
    )
    torch.manual_seed(2)
    v3 = DeepseekV3ForCausalLM(DeepseekV3Config(**MOE, initializer_range=0.2))
    for name, model in (("ours", ours), ("llama", llama), ("v3", v3)):
        model.to(torch.bfloat16).save_pretrained(HERE / name)
        tokenizer.save_pretrained(HERE / name)


if __name__ == "__main__":
    main()
