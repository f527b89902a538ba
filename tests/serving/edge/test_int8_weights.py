import numpy as np
import pytest

from deepseek_serving.edge.int8_weights import quantize_blocks, quantize_graph

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("width", [16, 32, 49])  # half a block, one, and one with a part
def test_blocks_are_near_and_zero_stays_zero(width):
    weights = np.random.default_rng(0).normal(size=(3, 5, width)).astype(np.float32)
    weights[1, 2] = 0
    codes, scales = quantize_blocks(weights)
    assert codes.shape == weights.shape and scales.shape == (3, 5, -(-width // 32))
    back = (codes.astype(np.float32) - 128) * np.repeat(scales, 32, axis=-1)[..., :width]
    assert np.abs(back - weights).max() <= scales.max() * 0.5001
    assert not back[1, 2].any()


def test_gathered_matrices_products_and_tied_tables_are_in_8_bits(tmp_path):
    helper, numpy_helper, kinds = onnx.helper, onnx.numpy_helper, onnx.TensorProto
    rng = np.random.default_rng(1)
    table, experts, square = (rng.normal(size=shape).astype(np.float32) for shape in ((50, 48), (6, 40, 48), (48, 48)))
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"], "embed"),
        helper.make_node("MatMul", ["x", "square"], ["y"], "product"),
        helper.make_node("GatherND", ["experts", "chosen"], ["gathered"], "experts"),
        helper.make_node("Transpose", ["table"], ["turned"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["y", "turned"], ["logits"], "head"),
    ]
    inputs = [("ids", [None]), ("chosen", [None, 1])]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, kinds.INT64, shape) for name, shape in inputs],
        [helper.make_tensor_value_info(name, kinds.FLOAT, None) for name in ("logits", "gathered")],
        [
            numpy_helper.from_array(one, name)
            for one, name in ((table, "table"), (experts, "experts"), (square, "square"))
        ],
    )
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "a.onnx")
    assert quantize_graph(tmp_path / "a.onnx", tmp_path / "b.onnx") == 1 + 1 + 6 + 1
    written = onnx.load(tmp_path / "b.onnx").graph
    assert {one.name for one in written.initializer}.isdisjoint({"table", "experts", "square"})
    feed = {"ids": np.arange(7), "chosen": np.array([[5], [0], [5]])}
    runs = [onnxruntime.InferenceSession(tmp_path / name).run(None, feed) for name in ("a.onnx", "b.onnx")]
    for exact, rounded in zip(*runs, strict=True):
        assert exact.shape == rounded.shape
        assert 0 < np.abs(exact - rounded).max() < 0.02 * np.abs(exact).max()
