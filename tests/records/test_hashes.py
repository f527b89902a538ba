import json

import pytest
import torch

from deepseek_records.hashes import hash_model, hash_rows, hash_texts, hash_tokenizer
from deepseek_training.data.tokenizer import train_tokenizer


def test_where_a_text_ends_is_part_of_the_hash():
    texts = (["ab", "c"], ["a", "bc"], ["abc"], ["ab", "c", ""], ["c", "ab"], ["ab", "C"], ["ab", "c\ud800"])
    assert len({hash_texts(each) for each in texts}) == len(texts)
    assert hash_texts(iter(["ab", "c"])) == hash_texts(("ab", "c"))


def test_rows_are_hashed_by_content_not_by_the_order_of_their_keys():
    assert hash_rows([{"a": 1, "b": [2]}]) == hash_rows([json.loads('{"b": [2], "a": 1}')])
    rows = ([{"a": 1}], [{"a": 1.5}], [{"a": "1"}], [{"a": None}], [{"a": True}], [{"a": 1}, {}], [[]])
    assert len({hash_rows(each) for each in rows}) == len(rows)


@pytest.mark.parametrize("size", [1, 7, 65_536, 65_537, 300_000])
def test_a_models_hash_follows_its_weights(size):
    torch.manual_seed(0)
    model = torch.nn.Linear(size, 1)
    first = hash_model(model)
    assert hash_model(model) == first
    kept = model.weight.detach().clone()
    for place in (0, size - 1):
        with torch.no_grad():
            model.weight[0, place] += 1
        assert hash_model(model) != first
        with torch.no_grad():
            model.weight.copy_(kept)
    assert hash_model(model) == first
    with torch.no_grad():
        model.weight.add_(1e-3 * torch.randn(1, size).sign())  # as a training step moves them
    assert hash_model(model) != first


def test_a_models_hash_follows_dtype_shape_names_and_buffers():
    torch.manual_seed(0)
    models = [torch.nn.Linear(4, 2), torch.nn.Linear(2, 4), torch.nn.Sequential(torch.nn.Linear(4, 2))]
    models.append(torch.nn.Linear(4, 2).to(torch.bfloat16))
    for model in models:
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
    models += [torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)]
    models[-1].running_mean += 1
    assert len({hash_model(model) for model in models}) == len(models)


def test_a_tokenizers_hash_follows_vocabulary_specials_and_template(tmp_path):
    tokenizer = train_tokenizer(["a fox and a crow sat on a wall"] * 4, 300)
    first = hash_tokenizer(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert hash_tokenizer(type(tokenizer).from_pretrained(tmp_path)) == first
    tokenizer(["a", "a fox"], padding=True, truncation=True, max_length=3)  # leaves its settings in the tokenizer
    assert hash_tokenizer(tokenizer) == first
    tokenizer.chat_template = "{{ messages }}"
    second = hash_tokenizer(tokenizer)
    tokenizer.add_tokens(["<new>"])
    third = hash_tokenizer(tokenizer)
    other = train_tokenizer(["another text with other words in it"] * 4, 300)
    assert len({first, second, third, hash_tokenizer(other)}) == 4
