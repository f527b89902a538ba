"""The choice of tiles: shipped, tuned, or safe with one log line."""

import dataclasses
import json
import logging
import multiprocessing
import os

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


@pytest.mark.parametrize(
    "card,major,shared,family",
    [
        ("A100, A800", 8, 166912, "sm_80"),
        ("L40S, RTX 4090", 8, 101376, "sm_80"),
        ("RTX 5090", 12, 101376, "sm_80"),
        ("H100, H200, GH200, H800, H20", 9, 232448, "sm_90"),
        ("B200, B300, GB300", 10, 232448, "sm_100"),
        ("a cut card of a known capability", 9, 101376, None),
        ("V100", 7, 98304, None),
        ("a card of the future", 13, 232448, None),
    ],
)
def test_a_gpu_is_known_by_what_it_can_do(card, major, shared, family):
    assert tiles.find_family(major, shared, "3.9.0") == family


def test_a_compiler_without_fences_is_refused_where_they_are_needed():
    with pytest.raises(ValueError, match=r"^triton: got 3.6.0, expected 3.8 or newer on compute capability 10.x"):
        tiles.find_family(10, 232448, "3.6.0")
    assert tiles.find_family(9, 232448, "3.6.0") == "sm_90"


def test_row_kernels_share_a_tile_height():
    for shipped in [*tiles.SHIPPED.values(), tiles.SAFE, tiles.INTERPRETED]:
        heights = {getattr(shipped, n).block_m for n in ("gate_up", "down", "down_backward", "input_gradient")}
        assert heights == {shipped.block_m}


def test_unknown_gpu_gets_safe_tiles_and_one_log_line(caplog):
    with caplog.at_level(logging.WARNING):
        for bucket in range(3):
            assert tiles._choose("Some GPU 9000", None, 64, 32, bucket) == tiles.SAFE
    assert len(caplog.records) == 1 and "Some GPU 9000" in caplog.text


def test_tuned_tiles_come_first():
    tuned = tiles.SHIPPED["sm_80", 0, 0, 0]
    tiles.save_tuned("NVIDIA H200", 64, 32, 2, tuned)
    assert tiles._choose("NVIDIA H200", "sm_90", 64, 32, 2) == tuned
    assert tiles._choose("NVIDIA H200", "sm_90", 64, 48, 2) == tiles.SHIPPED["sm_90", 0, 0, 2]
    tiles.save_tuned("NVIDIA H200", 64, 48, 2, tuned)
    assert len(tiles.load_tuned()) == 2


def entry(**changes):
    """One entry of the file, with some of a tile's sizes changed."""
    tuned = dataclasses.asdict(tiles.SHIPPED["sm_80", 0, 0, 0])
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
            assert tiles._choose("NVIDIA H200", "sm_90", 64, width, 2) == tiles.SHIPPED["sm_90", 0, 0, 2]
    assert caplog.text.count("is not usable") == 1
    # Saving anew replaces what could not be used.
    tuned = tiles.SHIPPED["sm_80", 0, 0, 0]
    tiles.save_tuned("NVIDIA H200", 64, 32, 2, tuned)
    assert tiles._choose("NVIDIA H200", "sm_90", 64, 32, 2) == tuned
    assert [p.name for p in path.parent.iterdir()] == ["tiles.json"]


TF32 = {
    "nothing": ("pass", "ieee"),
    "old": ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32"),
    "old_by_name": ("torch.set_float32_matmul_precision('high')", "tf32"),
    # What TrainingArguments(tf32=True) and torch_compile=True do.
    "new": ("torch.backends.fp32_precision = 'tf32'", "tf32"),
    "new_matmul": ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32"),
    "old_then_new": (
        "torch.set_float32_matmul_precision('high'); torch.backends.cuda.matmul.fp32_precision = 'ieee'",
        "ieee",
    ),
    "new_but_not_for_products": (
        "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'",
        "ieee",
    ),
    "new_and_back": ("torch.backends.fp32_precision = 'tf32'; torch.backends.fp32_precision = 'none'", "ieee"),
}


def _answer(code, results):
    exec(code, {"torch": torch})
    results.put([tiles.matmul_precision(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a setting is left behind in a process of its own")
@pytest.mark.parametrize("name", TF32)
def test_tf32_set_by_either_interface_of_torch(name):
    code, wanted = TF32[name]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_answer, args=(code, results))
    child.start()
    assert results.get(timeout=60) == [wanted, "ieee", "ieee"]
    child.join()


def test_wider_elements_take_no_more_shared_memory():
    wide = tiles.SHIPPED["sm_90", 0, 0, 2].for_dtype(torch.float32)
    assert wide.down.block_k * 4 == tiles.SHIPPED["sm_90", 0, 0, 2].down.block_k * 2
