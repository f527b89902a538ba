"""Launching a kernel again without having Triton look through its arguments again.

``kernel[grid](*arguments)`` binds, types and hashes some twenty arguments on every call, which takes the host longer
than a small layer takes a GPU. `launch` has it done once per kind of arguments and keeps the compiled kernel that
Triton returns. From then on it launches that, ``compiled[grid](*arguments)`` with the compile-time arguments included,
as Triton's tutorial on the fused softmax does, and with addresses in place of tensors: of each of these the launcher
would ask the driver whether it is on the GPU. Whatever might compile another kernel is part of the key: device, types
and compile-time arguments. Operands off 16 bytes are left to Triton, and so is everything under the interpreter and on
AMD, where sizes matter as well.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deepseek_kernels.gpu.triton_numerics import IS_INTERPRETED, LAUNCH

_ALIGNMENT = 16
# Kernel and constants of every kind of launch seen; beyond this many, all are forgotten and found again.
_MOST = 4096
# Also set by whoever compiles launches in place of running them.
is_left_to_triton = IS_INTERPRETED or torch.version.hip is not None
_known: dict[tuple[Any, ...], "_Launch"] = {}


class _Launch:
    """A kernel with its compile-time arguments, and what Triton made of it once it has."""

    def __init__(self, kernel: Any, num_operands: int, constants: dict[str, Any]) -> None:
        self.kernel = kernel  # kept: its id is in the key
        names = kernel.arg_names
        # Where an operand is None, so may the constants say.
        self.settings = {k: v for k, v in constants.items() if k not in names[:num_operands]} | LAUNCH
        self.constants = tuple(constants[name] for name in names[num_operands:])
        self.compiled: Any = None


def ceil_div(size: int, block: int) -> int:
    """Return how many blocks cover a size; Triton's own function takes the host microseconds.

    Args:
        size: To be covered.
        block: Of one block.
    """
    return -(-size // block)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    operands: Sequence[Any],
    constants_of: Callable[..., dict[str, Any]],
    *shape: Any,
    **settings: Any,
) -> None:
    """Launch a kernel with these operands, and the compile-time arguments ``constants_of(*shape, **settings)``.

    A setting named ``tile`` brings its launch options along.

    Args:
        kernel: A ``triton.jit`` function; compile-time arguments come last, and no integer is specialized.
        grid: Number of programs along up to three axes.
        operands: All other arguments in order: tensors, descriptors, None, and integers below 2^31.
        constants_of: Called once per kind of launch; its result depends on its arguments only.
        shape: For `constants_of`, hashable.
        settings: For `constants_of`, hashable; always the same names in the same order for one kernel.
    """
    addresses, values, types = 0, [], []
    for operand in operands:
        if isinstance(operand, Tensor):
            address = operand.data_ptr()
            addresses |= address
            values.append(address)
            types.append(operand.dtype)
            device = operand.device
        else:
            values.append(operand)
            types.append(type(operand))
    key = (id(kernel), device, *types, *shape, *settings.values())
    known = _known.get(key)
    if known is None:
        if len(_known) >= _MOST:
            _known.clear()
        options = settings["tile"].launch_options if "tile" in settings else {}
        known = _known[key] = _Launch(kernel, len(operands), {**constants_of(*shape, **settings), **options})
    if known.compiled is not None and not is_left_to_triton and addresses % _ALIGNMENT == 0:
        known.compiled[(*grid, 1, 1)[:3]](*values, *known.constants)
        return
    compiled = kernel[grid](*operands, **known.settings)
    if addresses % _ALIGNMENT == 0 and not is_left_to_triton:
        known.compiled = compiled
