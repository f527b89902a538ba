"""A cache gives back what was written, and refuses whatever it was not made of, in one line."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from deepseek_training.compress import teacher_cache as module
from deepseek_training.compress.distill_loss import shorten
from deepseek_training.compress.teacher_cache import CacheIdentity, block_keys, check_cache, fill_cache

IDENTITY = CacheIdentity(
    teacher="a" * 64,
    tokenizer="b" * 64,
    top_k=5,
    temperature=1.0,
    bf16=False,
    vocab_size=30,
    sequence_length=8,
)


class Teacher:
    """Logits that are a function of the token before and its place; counts the blocks it is asked for."""

    def __init__(self, vocab_size=30):
        self.table = torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(0))
        self.num_blocks = 0

    def __call__(self, input_ids, use_cache):
        self.num_blocks += len(input_ids)
        output = self.table[input_ids] + 0.1 * torch.arange(input_ids.shape[1]).view(1, -1, 1)
        return type("Output", (), {"logits": output})()


@pytest.fixture
def blocks():
    return torch.randint(0, 30, (20, 8), dtype=torch.int32, generator=torch.Generator().manual_seed(1))


def fill(folder, blocks, identity=IDENTITY, teacher=None, batch_size=3):
    return fill_cache(folder, identity, blocks, teacher or Teacher(identity.vocab_size), batch_size=batch_size)


def test_what_is_read_is_what_the_teacher_said_in_fp16(blocks, tmp_path):
    cache = fill(tmp_path / "cache", blocks)
    expected = shorten(Teacher()(blocks.long(), False).logits[:, :-1], 5, 1.0)
    for number in range(20):
        found = cache.read(number)
        assert torch.equal(found.ids, expected.ids[number])
        assert torch.equal(found.log_probs, expected.log_probs[number].to(torch.float16))
        torch.testing.assert_close(found.log_probs.float().exp().sum(-1), torch.ones(7), atol=2e-3, rtol=0)


def test_the_bytes_on_disk_are_those_that_are_announced(blocks, tmp_path):
    fill(tmp_path / "cache", blocks)
    num_bytes = sum((tmp_path / "cache" / name).stat().st_size for name in ("ids.bin", "log_probs.bin"))
    assert num_bytes == 20 * 7 * IDENTITY.bytes_per_token == 20 * 7 * (5 * 2 + 6 * 2)
    assert dataclasses.replace(IDENTITY, vocab_size=70_000).bytes_per_token == 5 * 4 + 6 * 2


@pytest.mark.parametrize("vocab_size", [65_536, 65_537])
def test_the_largest_id_survives(vocab_size, tmp_path):
    identity = dataclasses.replace(IDENTITY, vocab_size=vocab_size, top_k=1, sequence_length=4)

    def teacher(input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, vocab_size)
        logits[..., -1] = 9.0
        return type("Output", (), {"logits": logits})()

    cache = fill(tmp_path / "cache", torch.zeros(2, 4, dtype=torch.int32), identity, teacher)
    assert (cache.read(1).ids == vocab_size - 1).all()


def test_a_whole_cache_asks_no_teacher_and_a_longer_run_adds_to_it(blocks, tmp_path):
    fill(tmp_path / "cache", blocks[:12])
    teacher = Teacher()
    first = fill(tmp_path / "cache", blocks[:7], teacher=teacher, batch_size=5).read(6)
    assert teacher.num_blocks == 0
    longer = fill(tmp_path / "cache", blocks, teacher=teacher)
    assert teacher.num_blocks == 8
    assert torch.equal(longer.read(6).log_probs, first.log_probs)
    alone = fill(tmp_path / "alone", blocks, batch_size=20)
    for number in range(20):
        assert torch.equal(longer.read(number).ids, alone.read(number).ids)
        assert torch.equal(longer.read(number).log_probs, alone.read(number).log_probs)


def test_an_interrupted_write_goes_on_behind_the_last_whole_block(blocks, tmp_path, monkeypatch):
    """The teacher fails between two marks: what lies on disk behind the last mark is written again."""
    monkeypatch.setattr(module, "_BLOCKS_BETWEEN_MARKS", 4)

    class Failing(Teacher):
        def __call__(self, *args, **kwargs):
            if self.num_blocks >= 9:
                raise KeyboardInterrupt
            return super().__call__(*args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "cache", blocks, teacher=Failing())
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["num_blocks"] == 8
    assert (tmp_path / "cache" / "keys.bin").stat().st_size == 9 * 16
    assert check_cache(tmp_path / "cache", IDENTITY, block_keys(blocks)) == 8
    teacher = Teacher()
    cache = fill(tmp_path / "cache", blocks, teacher=teacher)
    assert teacher.num_blocks == 12
    alone = fill(tmp_path / "alone", blocks)
    assert all(torch.equal(cache.read(n).log_probs, alone.read(n).log_probs) for n in range(20))


def test_a_write_that_ended_before_its_first_mark_begins_again(blocks, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "ids.bin").write_bytes(b"half")
    cache, alone = fill(tmp_path / "cache", blocks), fill(tmp_path / "alone", blocks)
    assert torch.equal(cache.read(0).ids, alone.read(0).ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "c" * 64}, "was made with another teacher (aaaaaaaaaaaa then, cccccccccccc now)"),
        ({"tokenizer": "c" * 64}, "was made with another tokenizer"),
        ({"top_k": 6}, "was made with another top_k (5 then, 6 now)"),
        ({"temperature": 2.0}, "was made with another temperature (1.0 then, 2.0 now)"),
        ({"sequence_length": 9}, "was made with another sequence_length"),
        ({"bf16": True}, "was made with another bf16"),
    ],
)
def test_another_pair_is_refused_by_name(change, message, blocks, tmp_path):
    fill(tmp_path / "cache", blocks)
    with pytest.raises(ValueError) as caught:
        fill(tmp_path / "cache", blocks, dataclasses.replace(IDENTITY, **change))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_other_data_are_refused_by_block(blocks, tmp_path):
    fill(tmp_path / "cache", blocks)
    other = blocks.clone()
    other[13, 4] = (other[13, 4] + 1) % 30
    with pytest.raises(ValueError, match=r"was made of other data \(block 13 differs\)"):
        fill(tmp_path / "cache", other)
    fill(tmp_path / "cache", other[:13])  # the blocks before are the same


@pytest.mark.parametrize("name", ["keys.bin", "ids.bin", "log_probs.bin"])
def test_a_file_that_is_cut_short_is_refused(name, blocks, tmp_path):
    fill(tmp_path / "cache", blocks)
    path = tmp_path / "cache" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{name} is cut short"):
        fill(tmp_path / "cache", blocks)


def test_a_folder_of_something_else_is_refused(blocks, tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(FileExistsError, match="holds no cache of ours"):
        fill(tmp_path, blocks)
    (tmp_path / "thesis.txt").unlink()
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(ValueError, match="got no JSON"):
        fill(tmp_path, blocks)


def test_keys_are_of_content():
    one = torch.arange(8, dtype=torch.int32).view(2, 4)
    assert np.array_equal(block_keys(one), block_keys(one.long()))
    assert len({row.tobytes() for row in block_keys(torch.cat([one, one + 1, one]))}) == 4
