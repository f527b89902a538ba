import itertools

import numpy as np
import pytest
import torch

from deepseek_training.data.packing import MixedDataset, PackedDataset, cut_to_share, encode_documents
from deepseek_training.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some words to learn from, and some more of them"], 280)


def test_documents_are_framed_and_cannot_end_themselves(tokenizer):
    (ids,) = encode_documents([f"a{tokenizer.eos_token}b"], tokenizer)
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert (ids == tokenizer.eos_token_id).sum() == 1
    assert tokenizer.decode(ids[1:-1]) == f"a{tokenizer.eos_token}b"


def test_blocks_hold_every_document_in_some_order():
    documents = [np.full(length, length, dtype=np.int32) for length in (5, 7, 3, 11)]
    dataset = PackedDataset(documents, 4, seed=1)
    # 26 tokens: six blocks, two tokens left out at the end
    assert dataset.blocks.shape == (6, 4)
    stream = dataset.blocks.flatten().tolist()
    runs = [stream[0]] + [b for a, b in itertools.pairwise(stream) if a != b]
    assert sorted(runs) == [3, 5, 7, 11] and all(stream.count(run) == run for run in runs[:-1])
    item = dataset[2]
    assert torch.equal(item["input_ids"], item["labels"]) and item["input_ids"].dtype == torch.int64


def test_order_depends_on_the_seed_only():
    documents = [np.full(4, value, dtype=np.int32) for value in range(20)]
    first, again, other = (PackedDataset(documents, 4, seed=seed).blocks for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="3 tokens do not fill one block of sequence_length=4"):
        PackedDataset([np.arange(3)], 4)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.6])
def test_mix_has_the_wanted_share_of_distinct_general_blocks(share):
    domain, general = (PackedDataset([np.arange(base, base + num)], 4) for base, num in ((0, 160), (1000, 400)))
    mixed = MixedDataset(domain, general, share)
    is_general = mixed.blocks[:, 0] >= 1000
    assert is_general.double().mean() == pytest.approx(share, abs=0.02)
    assert len(mixed.blocks.unique(dim=0)) == len(mixed) and (~is_general).sum() == 40


def test_mix_without_enough_general_text_is_refused():
    domain, general = (PackedDataset([np.arange(num)], 4) for num in (160, 8))
    with pytest.raises(ValueError, match=r"replay_share=0\.5 needs 40 blocks of general text, but there are 2"):
        MixedDataset(domain, general, 0.5)


def test_cut_keeps_the_same_share_of_each_text():
    texts = ["a" * 100, "\u00e9" * 100, "b" * 700]  # 100, 200 and 700 bytes
    cut = cut_to_share(texts, 500)
    assert [len(text.encode()) for text in cut] == [50, 100, 350]
    assert cut_to_share(texts, 1000) == texts and cut_to_share(texts, None) == texts
