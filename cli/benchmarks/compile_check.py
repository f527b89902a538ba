"""Compile every kernel for GPUs that are not there, and read what it takes: registers, spills, shared memory.

The tests and the table in docs/kernels.md come from here. This prints that table::

    deepseek-moe bench compile

Surprising: Triton compiles for any target on a machine without a GPU, but does not check that the result fits; shared
memory is compared with each target's limit here, and spills are read from the assembled code.
"""

import argparse
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deepseek_cli.benchmarks.result_files import BenchmarkRun
from deepseek_kernels.epilogue import Epilogue
from deepseek_kernels.gpu import combine, decode, down_backward, gate_up, grouped_gemm, routing_metadata, row_sums
from deepseek_kernels.gpu import weight_gradient as weight_gradient_file
from deepseek_kernels.gpu.tiles import SAFE, SHIPPED, TARGETS, Tiles
from deepseek_kernels.gpu.triton_epilogue import backward_tile, forward_tile
from deepseek_kernels.gpu.triton_numerics import LAUNCH

SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448, "gfx942": 65536}
# wgmma and tcgen05 take 64 rows at least; Triton multiplies smaller tiles by mma.sync.
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", "gfx942": "v_mfma"}
NUM_EXPERTS, HIDDEN, WIDTH, SLOTS = 128, 2048, 768, 12
# By what the table calls them; all but the plain one with a bias. The last is GPT-OSS's.
EPILOGUES = {
    "": Epilogue(),
    "clamped": Epilogue(limit=7.0, alpha=1.702, shift=1.0),
    "clamped, interleaved": Epilogue(limit=7.0, alpha=1.702, shift=1.0, is_interleaved=True),
}

_POINTERS = {
    **{
        name: "*i32"
        for name in (
            "row_slot_ptr",
            "slot_row_ptr",
            "expert_start_ptr",
            "tile_start_ptr",
            "counts_ptr",
            "totals_ptr",
            "block_first_ptr",
            "sorted_row_ptr",
        )
    },
    **{name: "*i64" for name in ("ids_ptr", "indices_ptr")},
    **{
        name: "*fp32"
        for name in (
            "topk_weights_ptr",
            "slot_weight_ptr",
            "weights_ptr",
            "partial_ptr",
            "logits_ptr",
            "share_ptr",
            "grad_weights_ptr",
            "grad_logits_ptr",
        )
    },
}


@dataclass(frozen=True)
class Compilation:
    """One kernel with one set of compile-time arguments, for one target.

    Attributes:
        kernel: Its name.
        tile: What tells it from the same kernel with other sizes.
        is_matrix: Whether it multiplies tiles, so that a matrix instruction is expected.
        function: The ``triton.jit`` function.
        constants: Compile-time arguments.
        options: ``num_warps``, ``num_stages``, ``maxnreg``.
        blocks: Sizes of the blocks of every operand that comes by descriptor, by its name.
    """

    kernel: str
    tile: str
    is_matrix: bool
    function: object
    constants: dict[str, Any]
    options: dict[str, Any]
    blocks: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Usage:
    """What the compiled kernel takes.

    Attributes:
        registers: Per thread.
        spills: Bytes of stack per thread (NVIDIA) or spilled vector registers (AMD).
        shared: Bytes a program.
        has_matrix_instruction: Whether the target's tensor-core instruction occurs.
    """

    registers: int
    spills: int
    shared: int
    has_matrix_instruction: bool


def matrix_instruction(target: tuple[Any, ...], compilation: Compilation) -> str:
    """Return the tensor-core instruction a tiled product should compile to.

    Args:
        target: As in `tiles.TARGETS`.
        compilation: Which kernel.
    """
    if target[0] == "cuda" and compilation.constants["BLOCK_M"] < 64:
        return MATRIX_INSTRUCTION[80]
    return MATRIX_INSTRUCTION[target[1]]


def row_kernels(tiles: Tiles, dtype: torch.dtype = torch.bfloat16) -> Iterator[Compilation]:
    """Yield the five tiled products with these tiles; those that ask for descriptors with them and without.

    Args:
        tiles: From the table.
        dtype: Of the operands.
    """
    for label, epilogue in EPILOGUES.items():
        for compilation in _by_pointer(tiles, dtype, epilogue):
            if label and "LIMIT" not in compilation.constants:
                continue  # no epilogue: the plain one
            form = replace(compilation, tile=f"{compilation.tile} {label}".strip())
            is_grouped = compilation.function is grouped_gemm.grouped_gemm_kernel
            for one in (form, _by_slot(form)) if is_grouped else (form,):
                yield one
                tile = getattr(tiles, compilation.kernel, tiles.weight_gradient)
                if tile.uses_descriptor:
                    yield _by_descriptor(one)


def _by_slot(compilation: Compilation) -> Compilation:
    """The same where every token has one expert, so that the result is written in the token's place."""
    given = ("row_slot_ptr", "slot_weight_ptr")[: 2 if compilation.kernel == "down" else 1]
    constants = {name: value for name, value in compilation.constants.items() if name not in given}
    return replace(compilation, tile=f"{compilation.tile} by slot", constants=constants)


def _by_descriptor(compilation: Compilation) -> Compilation:
    """The same where the weights, and in the grouped product the rows too, come by descriptor."""
    flag = "DESCRIPTORS" if "DESCRIPTORS" in compilation.constants else "DESCRIPTOR"
    turned = compilation.kernel in ("gate_up", "down")  # weights stored output first
    m, n, k = (compilation.constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    blocks = {"weight_ptr": (n, k) if turned else (k, n)}
    if flag == "DESCRIPTORS":
        blocks["rows_ptr"] = (m, k)
    constants = {**compilation.constants, flag: True}
    return replace(compilation, tile=f"{compilation.tile} by descriptor", constants=constants, blocks=blocks)


def _by_pointer(tiles: Tiles, dtype: torch.dtype, epilogue: Epilogue) -> Iterator[Compilation]:
    shape, text = (dtype, NUM_EXPERTS, HIDDEN, WIDTH, SLOTS), epilogue.text
    tiles = replace(
        tiles, gate_up=forward_tile(tiles.gate_up, text), down_backward=backward_tile(tiles.down_backward, text)
    )
    gate_up_constants = gate_up.gate_up_constants(*shape, activation=text, keep_preactivation=True, tile=tiles.gate_up)
    if epilogue.is_plain:
        gate_up_constants["bias_ptr"] = None
    down_backward_constants = down_backward.down_backward_constants(*shape, activation=text, tile=tiles.down_backward)
    products = [
        ("gate_up", gate_up.gate_up_kernel, tiles.gate_up, gate_up_constants),
        ("down_backward", down_backward.down_backward_kernel, tiles.down_backward, down_backward_constants),
    ]
    for name, tile, inner, transpose in (
        ("down", tiles.down, WIDTH, True),
        ("input_gradient", tiles.input_gradient, 2 * WIDTH, False),
    ):
        constants = grouped_gemm.grouped_gemm_constants(
            dtype, NUM_EXPERTS, HIDDEN, inner, transpose=transpose, tile=tile
        )
        products.append((name, grouped_gemm.grouped_gemm_kernel, tile, constants))
    for side, sizes in (("left", (HIDDEN, WIDTH)), ("right", (2 * WIDTH, HIDDEN))):
        constants = weight_gradient_file.weight_gradient_constants(
            dtype, *sizes, SLOTS, gather=side, tile=tiles.weight_gradient
        )
        kernel = weight_gradient_file.weight_gradient_kernel
        products.append((f"weight_gradient_{side}", kernel, tiles.weight_gradient, constants))
    for name, function, tile, constants in products:
        sizes = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
        yield Compilation(name, sizes, True, function, constants, tile.launch_options)


def small_kernels(dtype: torch.dtype = torch.bfloat16) -> Iterator[Compilation]:
    """Yield the kernels without tiles of their own: metadata, combine, decode, sums of rows.

    Args:
        dtype: Of the activations.
    """
    meta, (few, many) = routing_metadata, routing_metadata.CHUNKS
    decode_shape = (dtype, NUM_EXPERTS, HIDDEN, WIDTH, SLOTS)
    decode_constants = decode.decode_gate_up_constants(*decode_shape, activation=EPILOGUES[""].text)
    sums = combine.combine_constants(dtype, SLOTS, HIDDEN, 1024)
    gradients = {**combine.combine_constants(dtype, SLOTS, HIDDEN, 1024, parts=6), "weights_ptr": None}
    for function, label, constants in (
        (meta.count_slots_kernel, "", meta.count_constants(NUM_EXPERTS, few)),
        (meta.count_slots_kernel, "many", meta.count_constants(NUM_EXPERTS, many)),
        (meta.place_slots_kernel, "one chunk", {**meta.place_constants(NUM_EXPERTS, few, 128), "counts_ptr": None}),
        (meta.place_slots_kernel, "", meta.place_constants(NUM_EXPERTS, few, 128)),
        (meta.place_slots_kernel, "many", meta.place_constants(NUM_EXPERTS, many, 128)),
        (meta.count_tiles_kernel, "", meta.tile_constants(NUM_EXPERTS, 128)),
        (combine.combine_kernel, "", {**sums, "partial_ptr": None, "grad_weights_ptr": None}),
        (combine.combine_kernel, "gradients", gradients),
        (combine.fill_unused_kernel, "", combine.fill_constants(HIDDEN, 1024)),
        (decode.decode_gate_up_kernel, "", {**decode_constants, "bias_ptr": None, "sorted_row_ptr": None}),
        (decode.decode_down_kernel, "", decode.decode_down_constants(*decode_shape)),
        (row_sums.row_sums_kernel, "", row_sums.row_sums_constants(dtype, 2 * WIDTH)),
    ):
        warps = {"num_warps": constants.get("num_warps", 4)}
        name = function.__name__.removesuffix("_kernel")
        yield Compilation(name, label, False, function, _without_options(constants), warps)


def compile_for(compilation: Compilation, target: tuple[Any, ...], dtype: str = "bf16") -> Usage:
    """Compile one kernel for one target and return what it takes.

    Args:
        compilation: Which kernel.
        target: Backend, architecture, threads a warp, as in `tiles.TARGETS`.
        dtype: Triton's name of the operands' type.
    """
    names = compilation.function.arg_names
    signature, attributes = {}, {}
    for position, name in enumerate(names):
        if name in compilation.constants:
            signature[name] = "constexpr"
            continue
        if name in compilation.blocks:
            signature[name] = f"tensordesc<{dtype}[1, {', '.join(map(str, compilation.blocks[name]))}]>"
            continue
        if name.endswith("_ptr"):
            signature[name] = _POINTERS.get(name, f"*{dtype}")
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        if name.endswith("_ptr") and name not in compilation.constants:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(compilation.function, signature, compilation.constants, attributes)
    options = {**compilation.options, **LAUNCH}
    compiled = triton.compile(source, target=GPUTarget(*target), options=options)
    instruction = matrix_instruction(target, compilation) if compilation.is_matrix else "none"
    return (_amd_usage if target[0] == "hip" else _nvidia_usage)(compiled, instruction)


def compile_products(tiles: Tiles, name: str, target: tuple[Any, ...], dtype: torch.dtype) -> Usage:
    """Compile the plain form of one product the way it is launched, by descriptor where its tile asks for it.

    Args:
        tiles: From the table.
        name: A field of `tiles`; of the two weight gradients the larger one.
        target: As in `tiles.TARGETS`.
        dtype: Of the operands.
    """
    kernel = "weight_gradient_right" if name == "weight_gradient" else name
    (found,) = [c for c in _by_pointer(tiles, dtype, EPILOGUES[""]) if c.kernel == kernel]
    return compile_for(_by_descriptor(found) if getattr(tiles, name).uses_descriptor else found, target)


def _nvidia_usage(compiled: Any, instruction: str) -> Usage:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", text).group(1)) for name in ("REG", "STACK"))
    return Usage(registers, stack, compiled.metadata.shared, instruction in compiled.asm["ptx"])


def _amd_usage(compiled: Any, instruction: str) -> Usage:
    text = compiled.asm["amdgcn"]
    registers, spills = (
        int(re.search(rf"\.{name}:\s*(\d+)", text).group(1)) for name in ("vgpr_count", "vgpr_spill_count")
    )
    return Usage(registers, spills, compiled.metadata.shared, instruction in text)


def _without_options(constants: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in constants.items() if name != "num_warps"}


def every_compilation() -> Iterator[tuple[str, tuple[Any, ...], Compilation]]:
    """Yield (GPU, target, kernel) for all that ships, each distinct one once per target."""
    seen = set()
    gpus = [(gpu, tiles) for (gpu, _, _, _), tiles in SHIPPED.items()]
    for gpu, tiles in itertools.chain(gpus, ((gpu, SAFE) for gpu in TARGETS)):
        target = TARGETS[gpu]
        for compilation in itertools.chain(row_kernels(tiles), small_kernels()):
            key = (target, compilation.kernel, str(compilation.constants), str(compilation.options))
            if key not in seen:
                seen.add(key)
                yield gpu, target, compilation


def run(args: argparse.Namespace) -> int:
    """Print the table of every kernel on every target, and write it as JSON.

    Args:
        args: The options of ``deepseek-moe bench compile``.
    """
    bench = BenchmarkRun("compile", args.output, {"triton": triton.__version__}, overwrite=args.overwrite)
    lines = ["| target | kernel | tile | warps, stages | registers | spills | shared KiB | matrix instruction |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(lines))
    rows = []
    for _, target, c in every_compilation():
        usage = compile_for(c, target)
        options = ", ".join(str(value) for value in c.options.values())
        instruction = matrix_instruction(target, c) if usage.has_matrix_instruction else ""
        arch = target[1] if target[0] == "hip" else f"sm_{target[1]}"
        lines.append(
            f"| {arch} | {c.kernel} | {c.tile} | {options} | {usage.registers} | {usage.spills} "
            f"| {usage.shared / 1024:.0f} | {instruction} |"
        )
        print(lines[-1], flush=True)
        rows.append({"target": arch, "kernel": c.kernel, "tile": c.tile, "options": c.options, **asdict(usage)})
    bench.finish({"rows": rows}, "\n".join(lines))
    return 0
