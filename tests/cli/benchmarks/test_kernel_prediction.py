"""The roofline model: what moves it, and that its error on an H200's measurements is what the page says."""

import argparse
import dataclasses
import json

import pytest

pytest.importorskip("triton")

from deepseek_cli.benchmarks import compile_check, kernel_prediction
from deepseek_cli.benchmarks.compile_check import Usage
from deepseek_cli.benchmarks.kernel_cells import Cell
from deepseek_cli.benchmarks.kernel_prediction import CARDS, PRODUCTS, Compiled, predict_layer, predict_product
from deepseek_kernels.gpu.tiles import SHIPPED, Tile

CELL = Cell(32768, 2048, 768, 128, 12)
# As compiled by Triton 3.9 for sm_90: registers, spills, shared memory.
FACTS = {
    "gate_up": Usage(180, 0, 147512, True),
    "down": Usage(154, 0, 196640, True),
    "input_gradient": Usage(155, 0, 147480, True),
    "down_backward": Usage(128, 16, 98328, True),
    "weight_gradient": Usage(202, 0, 147968, True),
}
PRODUCT = {name: Compiled(name, getattr(SHIPPED["sm_90", 0, 0, 2], name), facts) for name, facts in FACTS.items()}


def test_what_a_compiled_kernel_says():
    assert [PRODUCT[name].programs_per_multiprocessor for name in PRODUCTS] == [1, 1, 2, 1, 1]
    assert [PRODUCT[name].blocks_in_flight for name in PRODUCTS] == [2, 3, 2, 2, 2]


def test_what_makes_a_kernel_slower():
    rate = predict_product(PRODUCT["down_backward"], CELL, "H200")[1]
    for worse in (
        Usage(129, 0, 98328, True),  # one program where two were
        Usage(128, 16, 196656, True),
    ):
        assert predict_product(dataclasses.replace(PRODUCT["down_backward"], usage=worse), CELL, "H200")[1] < rate
    narrow = Tile(128, 64, 64, 8, 3, uses_descriptor=True)
    assert predict_product(Compiled("down_backward", narrow, Usage(83, 0, 98304, True)), CELL, "H200")[1] < rate
    one_block = Compiled("weight_gradient", Tile(128, 256, 64, 8, 3), Usage(172, 0, 98560, True))
    assert (
        predict_product(one_block, CELL, "H200")[1]
        < 0.9 * predict_product(PRODUCT["weight_gradient"], CELL, "H200")[1]
    )


def test_few_rows_are_bound_by_memory_and_there_the_cards_differ():
    few = Cell(256, 2048, 768, 128, 12)
    one, other = (predict_product(PRODUCT["gate_up"], few, card)[0] for card in ("H100", "H200"))
    assert one / other == pytest.approx(CARDS["H200"] / CARDS["H100"])
    many = [predict_product(PRODUCT["gate_up"], CELL, card)[0] for card in CARDS]
    assert many[0] == many[1]


def test_the_error_on_what_an_h200_measured():
    """With the shipped tiles' facts from above, so that nothing is compiled; the whole check is the command's."""
    passes = {cell: pair for cell, pair in kernel_prediction._MEASURED_LAYERS.items() if cell.T >= 8192}
    errors = [
        measured / predicted - 1
        for cell, pair in passes.items()
        for predicted, measured in zip(predict_layer(PRODUCT, cell, "H200"), pair, strict=True)
    ]
    assert len(errors) == 6 and max(map(abs, errors)) < 0.13, errors
    for name, (shipped, _) in kernel_prediction._MEASURED_PRODUCTS.items():
        for num_tokens, measured in zip((32768, 4096), shipped, strict=True):
            rate = predict_product(PRODUCT[name], dataclasses.replace(CELL, T=num_tokens), "H200")[1]
            assert abs(rate / measured - 1) < 0.16, (name, num_tokens, rate)


@pytest.mark.slow
def test_the_facts_are_what_compiling_gives():
    assert kernel_prediction.shipped_products() == PRODUCT
    kinds = kernel_prediction.errors()
    assert [len(values) for values in kinds.values()] == [10, 10, 6, 2]
    assert compile_check.EPILOGUES[""].is_plain


def results_file(path, **changes):
    """What `bench kernels` saves of one shape on an H100, of which the model gives the forward pass exactly."""
    row = {"T": 32768, "H": 2048, "I": 768, "E": 128, "K": 12, "routing": "balanced", "dtype": "bfloat16"}
    row |= {"device": "cuda", "implementation": "fused_moe"}
    forward, _ = predict_layer(PRODUCT, CELL, "H100")
    rows = [{**row, "mode": "forward", "ms": forward, "ms_stderr": 0.1}, {**row, "mode": "backward", "ms": 30.0}]
    rows += [{**row, "mode": "forward", "T": 16, "ms": 1.0}, {**row, "mode": "forward", "implementation": "eager"}]
    path.write_text(json.dumps({"rows": rows, "gpu": "NVIDIA H100 80GB HBM3", **changes}))
    return path


def test_every_measured_pass_stands_beside_its_prediction(tmp_path):
    rows, table = kernel_prediction.against_measured(results_file(tmp_path / "bench.json"), PRODUCT)
    assert [row["pass"] for row in rows] == ["forward", "backward"]
    lines = table.splitlines()
    assert lines[2].endswith("± 0.10 | 1.00 |") and "| backward |" in lines[3] and "30.00 ± 0.00" in lines[3]
    assert lines[-1].startswith("H100, 2 passes: mean error")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": "NVIDIA A100"}, "of NVIDIA A100, expected one of H100, H200"),
        ({"gpu": None}, "of no named GPU"),
        ({"rows": []}, "without rows of fused_moe"),
    ],
)
def test_a_file_that_says_nothing_of_the_model(tmp_path, changes, message):
    path = results_file(tmp_path / "bench.json", **changes)
    with pytest.raises(ValueError, match=f"measured: got .*{message}"):
        kernel_prediction.against_measured(path, PRODUCT)


def test_measured_goes_with_predict(tmp_path):
    with pytest.raises(ValueError, match="measured: got x without --predict"):
        kernel_prediction.run(argparse.Namespace(predict=False, measured="x"))
