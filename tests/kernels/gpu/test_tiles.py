"""The choice of tiles: shipped, tuned, or safe with one log line."""

import dataclasses
import json
import logging

import pytest
import torch

pytest.importorskip("triton")

from deepseek_kernels.gpu import tiles


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiles._choose.cache_clear()
    tiles._log_unknown.cache_clear()
    yield
    tiles._choose.cache_clear()


def test_bucket_depends_on_rows_per_expert_only():
    assert tiles.row_bucket(12 * 1, 128) == tiles.row_bucket(12 * 64, 128) == 0
    assert tiles.row_bucket(12 * 8192, 128) == tiles.row_bucket(12 * 32768, 128) == 2


def test_longest_name_wins_and_row_kernels_share_a_tile_height():
    assert tiles._choose("NVIDIA GH200 480GB", 2048, 768, 2) == tiles.SHIPPED[("GH200", 0, 0, 2)]
    for shipped in [*tiles.SHIPPED.values(), tiles.SAFE, tiles.INTERPRETED]:
        heights = {getattr(shipped, n).block_m for n in ("gate_up", "down", "down_backward", "input_gradient")}
        assert heights == {shipped.block_m}


def test_unknown_gpu_gets_safe_tiles_and_one_log_line(caplog):
    with caplog.at_level(logging.WARNING):
        for bucket in range(3):
            assert tiles._choose("Some GPU 9000", 64, 32, bucket) == tiles.SAFE
    assert len(caplog.records) == 1 and "Some GPU 9000" in caplog.text


def test_tuned_tiles_come_first():
    tuned = tiles.SHIPPED[("A100", 0, 0, 0)]
    tiles.save_tuned("NVIDIA H200", 64, 32, 2, tuned)
    assert tiles._choose("NVIDIA H200", 64, 32, 2) == tuned
    assert tiles._choose("NVIDIA H200", 64, 48, 2) == tiles.SHIPPED[("H200", 0, 0, 2)]
    tiles.save_tuned("NVIDIA H200", 64, 48, 2, tuned)
    assert len(tiles.load_tuned()) == 2


def entry(**changes):
    """One entry of the file, with some of a tile's sizes changed."""
    tuned = dataclasses.asdict(tiles.SHIPPED[("A100", 0, 0, 0)])
    for name, sizes in changes.items():
        tuned[name] = {**tuned[name], **sizes}
    return [{"device": "NVIDIA H200", "hidden": 64, "width": 32, "bucket": 2, "tiles": tuned}]


UNUSABLE = {
    "broken": "{broken",
    "another_layout": '{"version": 2}',
    "a_list_of_numbers": "[1, 2]",
    "tiles_missing": '[{"device": "NVIDIA H200", "hidden": 64, "width": 32, "bucket": 2, "tiles": {}}]',
    "tiles_a_list": '[{"device": "NVIDIA H200", "hidden": 64, "width": 32, "bucket": 2, "tiles": []}]',
    "size_no_power_of_two": json.dumps(entry(down={"block_n": 48})),
    "size_too_small": json.dumps(entry(down={"block_k": 8})),
    "size_a_text": json.dumps(entry(weight_gradient={"num_warps": "4"})),
    "heights_differ": json.dumps(entry(down={"block_m": 32})),
    "not_text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_file_that_cannot_be_used_gives_one_warning_and_the_shipped_tiles(name, caplog):
    content = UNUSABLE[name]
    path = tiles.tuned_path()
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with caplog.at_level(logging.WARNING):
        for width in (32, 48, 64):
            assert tiles._choose("NVIDIA H200", 64, width, 2) == tiles.SHIPPED[("H200", 0, 0, 2)]
    assert caplog.text.count("is not usable") == 1
    # Saving anew replaces what could not be used.
    tuned = tiles.SHIPPED[("A100", 0, 0, 0)]
    tiles.save_tuned("NVIDIA H200", 64, 32, 2, tuned)
    assert tiles._choose("NVIDIA H200", 64, 32, 2) == tuned
    assert [p.name for p in path.parent.iterdir()] == ["tiles.json"]


def test_wider_elements_take_no_more_shared_memory():
    wide = tiles.SHIPPED[("H200", 0, 0, 2)].for_dtype(torch.float32)
    assert wide.down.block_k * 4 == tiles.SHIPPED[("H200", 0, 0, 2)].down.block_k * 2
