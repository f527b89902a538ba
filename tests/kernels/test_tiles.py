"""The choice of tiles: shipped, tuned, or safe with one log line."""

import logging

import pytest
import torch

pytest.importorskip("triton")

from deepseek_kernels import tiles


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


def test_tuned_tiles_come_first(caplog):
    tuned = tiles.SHIPPED[("A100", 0, 0, 0)]
    path = tiles.save_tuned("NVIDIA H200", 64, 32, 2, tuned)
    assert tiles._choose("NVIDIA H200", 64, 32, 2) == tuned
    assert tiles._choose("NVIDIA H200", 64, 48, 2) == tiles.SHIPPED[("H200", 0, 0, 2)]
    tiles.save_tuned("NVIDIA H200", 64, 48, 2, tuned)
    assert len(tiles.load_tuned()) == 2
    path.write_text("{broken")
    tiles._choose.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert tiles._choose("NVIDIA H200", 64, 32, 2) == tiles.SHIPPED[("H200", 0, 0, 2)]
    assert "unreadable" in caplog.text


def test_wider_elements_take_no_more_shared_memory():
    wide = tiles.SHIPPED[("H200", 0, 0, 2)].for_dtype(torch.float32)
    assert wide.down.block_k * 4 == tiles.SHIPPED[("H200", 0, 0, 2)].down.block_k * 2
