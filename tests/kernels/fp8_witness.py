"""`fused_moe_fp8` by its CPU path wherever the tensors are: what the Triton kernels are held against."""

from types import SimpleNamespace

import pytest
from fp8_cases import gradients

from deepseek_kernels import fused_moe_fp8
from deepseek_kernels.cpu import fp8_experts as fp8_experts_cpu
from deepseek_kernels.slot_order import SlotOrder


def route(ids, num_experts):
    return SlotOrder(*(t.to(ids.device) for t in fp8_experts_cpu.route(ids.cpu(), num_experts).tensors()))


WITNESS = SimpleNamespace(**{**vars(fp8_experts_cpu), "route": route})


def witness(case, function=fused_moe_fp8.fused_moe_fp8, **settings):
    """Output and gradients by the CPU path, wherever the tensors are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_moe_fp8, "_module_for", lambda tensor: WITNESS)
        return gradients(function, case, **settings)
