"""Documents that are packed apart: their loss is that of each alone, for three families; hardly a token is padding."""

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from deepseek_training.data.packing import encode_documents
from deepseek_training.data.separate import SeparateDataset, best_fit
from deepseek_training.data.texts import load_texts
from deepseek_training.data.tokenizer import train_tokenizer
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
MODELS = {
    "ours": lambda: DeepseekForCausalLM(DeepseekConfig.from_preset("debug", vocab_size=300, initializer_range=0.2)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, **HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, num_local_experts=4)),
}


@pytest.fixture(scope="module")
def documents():
    texts = load_texts("medicine", "validation")[:60]
    return encode_documents(texts, train_tokenizer(texts, 300))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_loss_is_that_of_each_document_alone(documents, family, attention):
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    model.set_attn_implementation(attention)
    # lengths around the block: one token too many, exactly one block, two tokens; 64 tokens per block
    short = [
        documents[0][:65],
        documents[1][:64],
        documents[2][:2],
        *(one[:n] for one, n in zip(documents[3:9], (9, 31, 33, 17, 40, 5), strict=True)),
    ]
    dataset = SeparateDataset(short, 64, pad_token_id=0)
    batch = {name: torch.stack([dataset[i][name] for i in range(len(dataset))]) for name in dataset[0]}
    with torch.no_grad():
        packed = model(**batch, use_cache=False).loss * (batch["labels"] != -100).sum()
        alone, count = 0.0, 0
        for document in [short[0][:64], short[0][63:], *short[1:]]:
            ids = torch.from_numpy(document.astype(np.int64)).unsqueeze(0)
            alone += model(input_ids=ids, labels=ids, use_cache=False).loss * (len(document) - 1)
            count += len(document) - 1
    assert count == sum(map(len, short)) - len(short) == int((batch["labels"] != -100).sum())
    assert packed.item() == pytest.approx(alone.item(), rel=1e-5)
    # without positions, attention crosses from one document to the next
    with torch.no_grad():
        joined = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
    assert abs(joined * count - packed) > 1e-4 * packed


@pytest.mark.parametrize(
    "length", [pytest.param(128, marks=pytest.mark.slow), 256, pytest.param(1024, marks=pytest.mark.slow)]
)
def test_every_token_is_predicted_once_and_little_is_padding(length):
    texts = load_texts("medicine", "train")
    documents = encode_documents(texts, train_tokenizer(texts[:50], 1000))
    dataset = SeparateDataset(documents, length, pad_token_id=0, seed=3)
    assert 0 <= dataset.waste < 0.02
    rows = [dataset[place] for place in range(len(dataset))]
    labels = torch.cat([row["labels"] for row in rows])
    predicted = torch.bincount(labels[labels != -100], minlength=1000)
    wanted = np.bincount(np.concatenate([one[1:] for one in documents]), minlength=1000)
    assert np.array_equal(predicted.numpy(), wanted)
    padded = sum(int((row["labels"] == -100).sum()) for row in rows) - sum(
        1 + max(0, -(-(len(one) - length) // (length - 1))) for one in documents
    )
    assert dataset.waste == pytest.approx(padded / (len(dataset) * length))
    again, other = (SeparateDataset(documents, length, pad_token_id=0, seed=seed) for seed in (3, 4))
    assert torch.equal(again[2]["input_ids"], rows[2]["input_ids"])
    assert any(not torch.equal(other[i]["input_ids"], rows[i]["input_ids"]) for i in range(len(rows)))


def test_best_fit_fills_bins_that_first_fit_would_not():
    assert best_fit(np.array([7, 6, 4, 3]), 10) == [[0, 3], [1, 2]]
    assert best_fit(np.array([10, 10]), 10) == [[0], [1]]
