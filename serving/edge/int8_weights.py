"""Weights of an ONNX graph in 8 bits, each matrix in blocks of 32 with a scale.

`onnx_export.py` calls it. onnxruntime's `quantize_dynamic` leaves the experts in fp32: they are three-dimensional and
reach their products through a gather. Here the gather itself reads 8-bit blocks (`GatherBlockQuantized`) and the other
products are `MatMulNBits`, both onnxruntime's own operators, also in its WebAssembly build. Only weights are rounded,
so a token's numbers depend on no other token. The router stays in fp32: a rounded one takes other experts.
"""

from pathlib import Path
from typing import Any

import numpy as np

BLOCK_SIZE = 32
_DOMAIN = "com.microsoft"
# MatMulNBits: products in int8, each row of the input rounded by blocks too. 0 would be fp32, about half as fast.
_ACCURACY_LEVEL = 4


def quantize_blocks(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return 8-bit codes and scales of blocks along the last axis: `weight = (code - 128) * scale`.

    Args:
        weights: `[..., width]` fp32.

    Returns:
        Codes `[..., width]` uint8, and scales `[..., ceil(width / 32)]` fp32.
    """
    width = weights.shape[-1]
    num_blocks = -(-width // BLOCK_SIZE)
    padding = [(0, 0)] * (weights.ndim - 1) + [(0, num_blocks * BLOCK_SIZE - width)]
    blocks = np.pad(weights, padding).reshape(*weights.shape[:-1], num_blocks, BLOCK_SIZE)
    scales = np.abs(blocks).max(-1) / 127
    codes = np.rint(blocks / np.where(scales == 0, 1, scales)[..., None]) + 128
    return codes.reshape(*weights.shape[:-1], -1)[..., :width].astype(np.uint8), scales.astype(np.float32)


def quantize_graph(source: Path, target: Path) -> int:
    """Write a graph again with its matrices in 8 bits.

    Args:
        source: An ONNX file of fp32.
        target: The file to write.

    Returns:
        How many matrices are in 8 bits, an expert's among them counted each.
    """
    import onnx

    model = onnx.load(source)
    graph = model.graph
    weights = {one.name: one for one in graph.initializer}
    transposed = {
        node.output[0]: weights[node.input[0]]
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in weights and len(weights[node.input[0]].dims) == 2
    }
    count, nodes = 0, []
    for node in graph.node:
        replaced, number = _quantized(node, weights, transposed, graph.initializer)
        nodes += replaced
        count += number
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused(graph)
    if all(one.domain != _DOMAIN for one in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(_DOMAIN, 1))
    onnx.save(model, target)
    return count


def _quantized(node: Any, weights: Any, transposed: Any, initializers: Any) -> tuple[list[Any], int]:
    """What stands for a node, and the number of its matrices that are now in 8 bits."""
    from onnx import numpy_helper

    if node.op_type == "MatMul" and node.input[1] in transposed:
        rows = numpy_helper.to_array(transposed[node.input[1]])  # [N, K], as MatMulNBits has it
        return _product(node, rows, initializers), 1
    if node.op_type == "MatMul" and node.input[1] in weights and len(weights[node.input[1]].dims) == 2:
        return _product(node, numpy_helper.to_array(weights[node.input[1]]).T, initializers), 1
    if node.op_type in ("Gather", "GatherND") and node.input[0] in weights:
        table = numpy_helper.to_array(weights[node.input[0]])
        if table.dtype == np.float32 and table.ndim >= 2:
            return _lookup(node, table, initializers), len(table) if table.ndim == 3 else 1
    return [node], 0


def _product(node: Any, rows: np.ndarray, initializers: Any) -> list[Any]:
    """`MatMulNBits` in place of `x @ rows.T`; rows `[N, K]`."""
    from onnx import helper

    num_out, num_in = rows.shape
    codes, scales = quantize_blocks(rows)
    num_blocks = scales.shape[1]
    codes = np.pad(codes, ((0, 0), (0, num_blocks * BLOCK_SIZE - num_in)), constant_values=128)
    names = _add(node, initializers, codes.reshape(num_out, num_blocks, BLOCK_SIZE), scales)
    attributes = {"K": num_in, "N": num_out, "bits": 8, "block_size": BLOCK_SIZE, "accuracy_level": _ACCURACY_LEVEL}
    inputs = [node.input[0], *names]
    return [helper.make_node("MatMulNBits", inputs, node.output, node.name, domain=_DOMAIN, **attributes)]


def _lookup(node: Any, table: np.ndarray, initializers: Any) -> list[Any]:
    """`GatherBlockQuantized` in place of a gather of rows or of whole matrices along the first axis."""
    from onnx import helper, numpy_helper

    names = _add(node, initializers, *quantize_blocks(table))
    indices, before = node.input[1], []
    if node.op_type == "GatherND":  # its indices have an axis of length 1 behind
        last = f"{node.name}.last_axis"
        initializers.append(numpy_helper.from_array(np.array([-1]), last))
        indices = f"{node.name}.indices"
        before = [helper.make_node("Squeeze", [node.input[1], last], [indices], f"{node.name}.squeeze")]
    attributes: dict[str, Any] = {
        "bits": 8,
        "block_size": BLOCK_SIZE,
        "gather_axis": 0,
        "quantize_axis": table.ndim - 1,
    }
    inputs = [names[0], indices, names[1]]
    return [
        *before,
        helper.make_node("GatherBlockQuantized", inputs, node.output, node.name, domain=_DOMAIN, **attributes),
    ]


def _add(node: Any, initializers: Any, codes: np.ndarray, scales: np.ndarray) -> list[str]:
    from onnx import numpy_helper

    names = [f"{node.name}.codes", f"{node.name}.scales"]
    for name, array in zip(names, (codes, scales), strict=True):
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
    return names


def _drop_unused(graph: Any) -> None:
    """Remove what nothing reads any more: transposes of tables, and initializers."""
    outputs = {one.name for one in graph.output}
    while True:
        read = {name for node in graph.node for name in node.input} | outputs
        unused = [node for node in graph.node if not any(name in read for name in node.output)]
        if not unused:
            break
        for node in unused:
            graph.node.remove(node)
    kept = [one for one in graph.initializer if one.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
