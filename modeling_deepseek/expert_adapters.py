"""PEFT's adapters of fused experts, handed to `fused_moe` as low-rank factors.

PEFT adapts a 3-D parameter (``LoraConfig(target_parameters=...)``) by a wrapper that puts ``W + scaling * B A`` in the
place of W for the length of a forward pass: a merged copy of all experts, and a gradient of its size. Importing this
file changes that one method of the wrapper: where experts run as ``fused_moe`` or ``fused_moe_fp8`` it leaves W alone
and the operator adds the factors' part itself. What is stored, saved, merged, disabled or unloaded stays PEFT's.

Experts that were loaded as FP8 codes are refused elsewhere: PEFT would add the product to codes that mean nothing
without their scales.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.utils import logging

try:
    from peft.tuners.lora.layer import ParamWrapper

    from deepseek_kernels.lora import LoraFactors
except ImportError:  # without either there is nothing to hand over
    LoraFactors = ParamWrapper = None  # type: ignore[assignment, misc]

logger = logging.get_logger(__name__)

_ATTRIBUTE = "_lora_factors"
_PARAMETERS = ("gate_up_proj", "down_proj")
_COMPUTE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_IMPLEMENTATIONS = ("fused_moe", "fused_moe_fp8")


def lora_arguments(experts: nn.Module) -> dict[str, Any]:
    """Return `fused_moe`'s arguments for the adapters that are active in this forward pass.

    Args:
        experts: The module that runs.
    """
    factors = vars(experts).get(_ATTRIBUTE, {})
    return {name.replace("_proj", "_lora"): factors[name] for name in _PARAMETERS if name in factors}


def reason_for_folding(wrapper: Any) -> str | None:
    """Return why PEFT has to add an adapter to the weights on every pass; None where `fused_moe` takes its factors.

    Args:
        wrapper: PEFT's ``ParamWrapper`` around an experts module that runs as ``fused_moe`` or ``fused_moe_fp8``.
    """
    experts = wrapper.get_base_layer()
    if _is_in_four_bits(experts):
        return None
    if wrapper.parameter_name not in _PARAMETERS:
        return f"{wrapper.parameter_name} is not one of the two projections"
    # Both, whichever this one adapts: the operator gives neither a gradient where one has an adapter.
    for name in _PARAMETERS:
        parameter = experts._parameters.get(name)
        if type(parameter) is not nn.Parameter or parameter.dim() != 3 or hasattr(parameter, "ds_id"):
            return f"{name} is not a plain parameter, or is split over processes"
        if parameter.dtype not in _COMPUTE_DTYPES and not _are_codes(parameter):
            return f"the experts are stored as {parameter.dtype}"
        if parameter.requires_grad:
            return "the experts' own weights train as well"
        if parameter.device.type not in ("cpu", "meta", "cuda"):
            return f"its factors have no kernels on {parameter.device.type}"
    bias = experts._parameters.get("gate_up_proj_bias")
    if bias is not None and bias.requires_grad:
        return "the experts' bias trains as well"
    return None


def runs_fused(experts: nn.Module) -> bool:
    """Return whether this is an experts module of transformers that runs as ``fused_moe`` or ``fused_moe_fp8``.

    Args:
        experts: What PEFT wraps.
    """
    config = vars(experts).get("config")
    return "is_concatenated" in vars(experts) and config._experts_implementation in _IMPLEMENTATIONS


def _are_codes(parameter: torch.Tensor | None) -> bool:
    """Whether a parameter holds FP8 codes, whose scales lie beside it."""
    return parameter is not None and parameter.is_floating_point() and parameter.itemsize == 1


def _is_in_four_bits(experts: nn.Module) -> bool:
    """Whether `four_bit_experts` put these weights into 4 bits; what PEFT sees of them is not a weight."""
    return "four_bit" in experts._modules


def _factors(wrapper: Any, adapters: Sequence[str]) -> Any:
    """The active adapters of one parameter as one: their ranks side by side, their scalings in B."""
    pairs = [(wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, wrapper.scaling[name]) for name in adapters]
    if len(pairs) == 1:
        return LoraFactors(*pairs[0])
    num_experts = wrapper.num_experts
    a = torch.cat([a.view(num_experts, -1, a.shape[1]) for a, _, _ in pairs], dim=1).flatten(0, 1)
    b = torch.cat([scaling * b.view(b.shape[0], -1, num_experts) for _, b, scaling in pairs], dim=1).flatten(1)
    return LoraFactors(a, b)


def _install() -> None:
    fold = ParamWrapper._activate_lora
    if hasattr(fold, "hands_over_factors"):  # another copy of this file was imported before
        return

    @contextmanager
    def activate(self: Any, active_adapters: list[str]) -> Iterator[None]:
        experts = self.get_base_layer()
        adapters = [name for name in active_adapters or () if name in self.lora_A]
        if adapters and _are_codes(experts._parameters.get(self.parameter_name)) and not runs_fused(experts):
            raise ValueError(
                f"experts_implementation: got {experts.config._experts_implementation} for an adapter of "
                f"{type(experts).__name__}, whose weights are FP8 codes, expected fused_moe_fp8"
            )
        if not adapters or not (runs_fused(experts) or _is_in_four_bits(experts)):
            with fold(self, active_adapters):
                yield
            return
        reason = reason_for_folding(self)
        if reason is not None and not is_parametrized(experts):  # else said for the other projection
            logger.warning_once(
                f"fused_moe: the adapter of {type(experts).__name__} is added to a copy of its weights on every pass, "
                f"which is slower and takes more memory: {reason}"
            )
        if reason is not None:
            with fold(self, active_adapters):
                yield
            return
        factors: dict[str, Any] = vars(experts).setdefault(_ATTRIBUTE, {})
        factors[self.parameter_name] = _factors(self, adapters)
        try:
            yield
        finally:
            del factors[self.parameter_name]

    merge = ParamWrapper.merge

    def merge_unless_quantized(self: Any, *args: Any, **kwargs: Any) -> None:
        experts = self.get_base_layer()
        if _is_in_four_bits(experts):
            raise ValueError("merge: got experts in 4 bits, expected ordinary weights; call dequantize_experts first")
        if _are_codes(experts._parameters.get(self.parameter_name)):
            raise ValueError(
                "merge: got experts as FP8 codes, expected ordinary weights; load the base with dequantize"
            )
        merge(self, *args, **kwargs)

    activate.hands_over_factors = True  # type: ignore[attr-defined]
    ParamWrapper._activate_lora = activate
    ParamWrapper.merge = merge_unless_quantized


if ParamWrapper is not None:
    _install()
