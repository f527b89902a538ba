"""Frozen experts that stay in 4 bits: quantized in place, trained through adapters, put back to be merged.

`quantize_experts` works for every family whose experts run as ``fused_moe``. A module keeps its class and the names of
its parameters, so that PEFT finds them; each parameter becomes one number that is shown in the parameter's shape, and
codes and scales lie in a submodule, `four_bit`. Only `fused_moe` reads those, whatever experts implementation is set.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .expert_adapters import lora_arguments
from .experts_form import find_epilogue
from .families import find_moe_layers

try:
    from deepseek_kernels.four_bit import FourBitFormat, PackedMatrices
    from deepseek_kernels.fused_moe_four_bit import fused_moe_four_bit
except ImportError:
    FourBitFormat = PackedMatrices = None  # type: ignore[assignment, misc]

METHOD = "four_bit_experts"  # transformers' quant_method
PROJECTIONS = {"gate_up_proj": "gate_up", "down_proj": "down"}


class FourBitWeights(nn.Module):
    """Codes and scales of both projections, as buffers.

    Args:
        fmt: How they are stored.
        shapes: By projection, [E, M, N].
        dtype: Of the weights.
        device: Where.
    """

    def __init__(self, fmt: Any, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        self.format, self.shapes, self.dtype = fmt, shapes, dtype
        for name, shape in shapes.items():
            for part, buffer in zip(("codes", "scales"), fmt.empty(shape, dtype, device), strict=True):
                self.register_buffer(f"{PROJECTIONS[name]}_{part}", buffer)

    def fill(self, name: str, stack: Tensor) -> None:
        """Quantize one projection, an expert at a time.

        Args:
            name: Of the projection.
            stack: [E, M, N].
        """
        for expert in range(stack.shape[0]):
            self.fill_expert(name, expert, stack[expert])

    def fill_expert(self, name: str, expert: int, matrix: Tensor, given: Tensor | None = None) -> None:
        """Quantize one expert's matrix of a projection.

        Args:
            name: Of the projection.
            expert: Its place.
            matrix: [M, N].
            given: Scales of int4 to round by, as in `FourBitFormat.quantize_into`.
        """
        codes, scales = (self.get_buffer(f"{PROJECTIONS[name]}_{part}") for part in ("codes", "scales"))
        self.format.quantize_into(matrix, codes[expert], scales[expert], given)

    def matrices(self, name: str, dtype: torch.dtype) -> Any:
        """Return a projection to be read expert by expert.

        Args:
            name: Of the projection.
            dtype: Of what is read.
        """
        codes, scales = (self._buffers[f"{PROJECTIONS[name]}_{part}"] for part in ("codes", "scales"))
        return PackedMatrices(codes, scales, self.shapes[name], self.format, dtype)


def quantize_experts(model: nn.Module, bits: int = 4, format: str = "nf4", group_size: int | None = None) -> nn.Module:
    """Put the routed experts of a model into 4 bits, one matrix at a time; they are frozen from then on.

    Args:
        model: Any causal language model with fused experts.
        bits: 4.
        format: ``nf4``, bitsandbytes' codes, or ``int4``, compressed-tensors' packing.
        group_size: Weights per scale; None: 64 for nf4, 128 for int4.

    Returns:
        The same model.

    Raises:
        ValueError: No such format, a group that does not divide, or experts that cannot be stored so.

    Example:
        >>> import torch
        >>> from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM, quantize_experts
        >>> model = quantize_experts(DeepseekForCausalLM(DeepseekConfig.from_preset("debug", vocab_size=61)))
        >>> model.model.layers[1].mlp.experts.four_bit.down_codes.dtype
        torch.uint8
    """
    fmt = find_format(bits, format, group_size)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: got {type(model).__name__}, expected a loaded model (AutoModelForCausalLM...)")
    modules = packable_experts(model, fmt)
    for experts in modules:
        weights = begin_four_bits(experts, fmt)
        for name in PROJECTIONS:
            weights.fill(name, experts._parameters[name].data)
            _let_go(experts, name)
        run_in_four_bits(experts)
    settings = {"quant_method": METHOD, "bits": bits, "format": fmt.name, "group_size": fmt.group_size}
    model.config.quantization_config = settings
    return model


def begin_four_bits(experts: nn.Module, fmt: Any) -> FourBitWeights:
    """Return the place for a module's codes and scales, still to be filled; it computes as before.

    Args:
        experts: From `packable_experts`.
        fmt: From `find_format`.
    """
    shapes = {name: tuple(experts._parameters[name].shape) for name in PROJECTIONS}
    first = experts._parameters["down_proj"]
    experts.four_bit = FourBitWeights(fmt, shapes, first.dtype, first.device)
    return experts.four_bit


def end_four_bits(experts: nn.Module) -> None:
    """Let go of a module's ordinary weights and have it compute by its codes.

    Args:
        experts: With `four_bit` filled.
    """
    for name in PROJECTIONS:
        _let_go(experts, name)
    run_in_four_bits(experts)


def _let_go(experts: nn.Module, name: str) -> None:
    weight = experts._parameters[name]
    experts._parameters[name] = placeholder(tuple(weight.shape), weight.dtype, weight.device)


def dequantize_experts(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Put ordinary weights in the place of those in 4 bits: before an adapter is merged, or another format written.

    Args:
        model: From `quantize_experts`, with or without an adapter around it.
        dtype: Of the weights.

    Returns:
        The same model.
    """
    for module in list(model.modules()):
        weights = module._modules.get("four_bit")
        if not isinstance(weights, FourBitWeights):
            continue
        for name, shape in weights.shapes.items():
            matrices = weights.matrices(name, dtype)
            stack = torch.empty(shape, dtype=dtype, device=matrices.device)
            for expert in range(shape[0]):
                stack[expert] = matrices[expert]
            module._parameters[name] = nn.Parameter(stack, requires_grad=False)
        del module.four_bit, module.forward, module._apply
        for handle in module.__dict__.pop("_four_bit_hooks"):
            handle.remove()
    vars(model.config).pop("quantization_config", None)
    return model


def has_four_bits(model: nn.Module) -> bool:
    """Return whether any experts of a model are in 4 bits.

    Args:
        model: Any module.
    """
    return any(isinstance(module, FourBitWeights) for module in model.modules())


def placeholder(shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> nn.Parameter:
    """Return a frozen parameter of this shape that takes one number of memory; NaN, so that nobody computes with it.

    Args:
        shape: To show.
        dtype: To show.
        device: Where.
    """
    return nn.Parameter(torch.full((1,), torch.nan, dtype=dtype, device=device).expand(shape), requires_grad=False)


def run_in_four_bits(experts: nn.Module) -> None:
    """Have a module with `four_bit` compute by it and leave the placeholders out of state dicts.

    Args:
        experts: With `four_bit` and placeholders.
    """
    experts.forward = MethodType(four_bit_experts_forward, experts)
    experts._apply = MethodType(_apply_without_placeholders, experts)
    experts._four_bit_hooks = [
        experts.register_state_dict_post_hook(_without_placeholders),
        experts.register_load_state_dict_post_hook(_expects_no_placeholders),
    ]


def four_bit_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return the experts' output, computed from codes.

    Args:
        self: An experts module from `quantize_experts`.
        hidden_states: [T, H].
        top_k_index: [T, K]; at or above E means unused.
        top_k_weights: [T, K].
    """
    dtype = self._parameters["down_proj"].dtype
    if torch.is_autocast_enabled(hidden_states.device.type):
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
    gate_up, down = (self.four_bit.matrices(name, dtype) for name in PROJECTIONS)
    operands = (hidden_states.to(dtype), gate_up, down, top_k_index, top_k_weights)
    output = fused_moe_four_bit(*operands, activation=find_epilogue(self), **lora_arguments(self))
    return output.to(hidden_states.dtype)


def _apply_without_placeholders(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """Move or cast a module with placeholders as single numbers: torch would give each its whole shape in memory."""
    shown = {name: self._parameters.pop(name) for name in PROJECTIONS}
    type(self)._apply(self, fn, recurse)
    for name, parameter in shown.items():
        number = fn(parameter.data.as_strided((1,), (1,)))
        self._parameters[name] = nn.Parameter(number.expand(parameter.shape), requires_grad=False)
    return self


def find_format(bits: int, format: str, group_size: int | None) -> Any:
    """Return the format of these settings.

    Args:
        bits: 4.
        format: ``nf4`` or ``int4``.
        group_size: None for the format's own.

    Raises:
        ValueError: There is no such format.
        ImportError: The kernels are not installed.
    """
    if FourBitFormat is None:
        raise ImportError("quantize_experts: deepseek_kernels is not installed; pip install deepseek-moe")
    return FourBitFormat.of(bits, format, group_size)


def packable_experts(model: nn.Module, fmt: Any) -> list[nn.Module]:
    """Return a model's experts modules, every one of which can be stored so.

    Args:
        model: With ordinary weights.
        fmt: From `find_format`.

    Raises:
        ValueError: There are none, or one cannot.
    """
    found = [layer.experts for layer in find_moe_layers(model) if layer.experts is not None]
    found = [experts for experts in found if set(PROJECTIONS) <= set(experts._parameters)]
    if not found:
        raise ValueError(f"model: got {type(model).__name__} without fused experts, expected routed experts")
    for experts in found:
        _check(experts, fmt)
    return found


def _check(experts: nn.Module, fmt: Any) -> None:
    """Refuse what would be stored or computed wrongly."""
    name = type(experts).__name__
    if "four_bit" in experts._modules:
        raise ValueError(f"model: got {name} in 4 bits already, expected ordinary weights")
    flags = {
        "is_transposed": experts.is_transposed,
        "has_bias": experts.has_bias,
        "has_gate": not experts.has_gate,
        "has_post_expert_norm": vars(experts).get("has_post_expert_norm", False),
    }
    wrong = [flag for flag, is_wrong in flags.items() if is_wrong]
    if wrong:
        value = getattr(experts, wrong[0])
        raise ValueError(f"model: got {name} with {wrong[0]}={value}, which 4-bit experts do not compute")
    find_epilogue(experts)
    for projection in PROJECTIONS:
        parameter = experts._parameters[projection]
        if parameter.device.type not in ("cpu", "cuda", "meta"):
            raise ValueError(f"model: got {name} on {parameter.device}, expected 4-bit experts on a CPU or a GPU")
        fmt.check(projection, tuple(parameter.shape))


def _without_placeholders(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for name in PROJECTIONS:
        state.pop(prefix + name, None)


def _expects_no_placeholders(_module: nn.Module, incompatible: Any) -> None:
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if key.rpartition(".")[2] not in PROJECTIONS]
