"""Calls whose buffers have fewer rows than there are slots, as where a device has few of the experts."""

import functools

import torch
from lora_cases import make_lora_case, names_of, reference, run, step
from moe_cases import assert_close, assert_equals_reference, gradients, make_case

from deepseek_kernels.fused_moe import fused_moe

NUM_EXPERTS = 6


def bounded_case(dtype, device="cpu", **shape):
    """A case, and how many of its slots are used."""
    case = make_case(dtype, device=device, E=NUM_EXPERTS, **shape)
    return case, int((case[3] < NUM_EXPERTS).sum())


def assert_bounds_change_nothing(dtype, device="cpu", **shape):
    """As many rows as are used, some more, and more than there are slots: the reference's values."""
    for extra in (0, 3, 10_000):
        case, used = bounded_case(dtype, device, **shape)
        bounded = functools.partial(fused_moe, max_rows=used + extra)
        assert_equals_reference(gradients(bounded, case), case, dtype)


def assert_bounds_change_nothing_under_adapters(device="cpu", **shape):
    """Output and all gradients with factors in buffers of as many rows as are used, and of some more."""
    case = make_lora_case(torch.float64, device=device, E=NUM_EXPERTS, **shape)
    used, wanted = int((case["ids"] < NUM_EXPERTS).sum()), reference(case)
    for extra in (0, 3):
        case["max_rows"] = used + extra
        for name, one, other in zip(names_of(case), step(case), wanted, strict=True):
            assert_close(name, one, other, torch.float64)
    sizes = []
    case["max_rows"] = used
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape) or t, lambda t: t):
        run(case)
    ranks = case["gate_up_lora"].a.shape[0] // NUM_EXPERTS
    assert [size[0] for size in sizes if len(size) == 2 and size[1] == ranks] == [used] * 2


def kept_rows(max_rows, device="cpu", **shape):
    """Rows of the pre-activation that a call keeps for its backward pass."""
    case, _ = bounded_case(torch.float32, device, **shape)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape) or t, lambda t: t):
        fused_moe(*case, max_rows=max_rows)
    width = case[2].shape[2]
    (rows,) = (size[0] for size in sizes if len(size) == 2 and size[1] == 2 * width)
    return rows
