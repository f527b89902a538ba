"""What the experts of a transformers module compute between their two products, told by what they do.

`fused_experts` asks for it. Families clamp, scale and shift in methods of their own, under names of their own, so no
name is believed: a candidate is built from the limits and factors that the module holds, and taken if it gives the
module's own numbers on a wide range.
"""

import functools
import itertools
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

try:
    from deepseek_kernels.epilogue import Epilogue
except ImportError:
    Epilogue = None

# By class name: transformers renames and moves these between versions, and torch.nn has its own of two of them.
ACTIVATION_CLASSES = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_pytorch_tanh",
    "NewGELUActivation": "gelu_pytorch_tanh",
    "FastGELUActivation": "gelu_pytorch_tanh",
}
_LIMIT_NAMES = ("limit", "swiglu_limit")
_ALPHA_NAMES = ("alpha", "swiglu_alpha")
_SHIFTS = (0.0, 1.0)
_found: weakref.WeakKeyDictionary[nn.Module, tuple[object, object]] = weakref.WeakKeyDictionary()


def activation_name(experts: nn.Module) -> str:
    """Return the kernel's name for the module's ``act_fn``, a module or a function.

    Args:
        experts: An experts module that has one.

    Raises:
        ValueError: The kernel has no such activation.
    """
    act_fn = experts.act_fn
    if isinstance(act_fn, nn.GELU):
        return "gelu_pytorch_tanh" if act_fn.approximate == "tanh" else "gelu"
    if isinstance(act_fn, functools.partial) and act_fn.func is F.gelu:
        return "gelu_pytorch_tanh" if act_fn.keywords.get("approximate") == "tanh" else "gelu"
    if act_fn is F.silu or act_fn is F.gelu:
        return act_fn.__name__
    name = type(act_fn).__name__
    if name not in ACTIVATION_CLASSES:
        raise ValueError(
            f"experts_implementation: fused_moe does not compute the activation {name} of {type(experts).__name__}, "
            f"only {', '.join(ACTIVATION_CLASSES)}; use grouped_mm"
        )
    return ACTIVATION_CLASSES[name]


def find_epilogue(experts: nn.Module) -> "Epilogue":
    """Return what the module computes between its products.

    Args:
        experts: A gated experts module.

    Raises:
        ValueError: Something that the kernel does not compute.
    """
    is_interleaved = not experts.is_concatenated
    if type(experts)._apply_gate is _default_apply_gate:
        if is_interleaved:
            raise ValueError(
                f"experts_implementation: fused_moe does not compute {type(experts).__name__} with "
                "is_concatenated=False and no _apply_gate of its own, which contradict each other; use grouped_mm"
            )
        return Epilogue(activation_name(experts))
    return _epilogue_of_own_gate(experts, is_interleaved)


@torch.compiler.disable
@torch.no_grad()
def _epilogue_of_own_gate(experts: nn.Module, is_interleaved: bool) -> "Epilogue":
    """The candidate that equals the module's own `_apply_gate`; remembered while the module's numbers stay."""
    numbers = tuple((k, v) for k, v in vars(experts).items() if isinstance(v, int | float))
    key = (numbers, type(experts), getattr(experts, "act_fn", None))
    known = _found.get(experts)
    if known is not None and known[0] == key:
        return known[1]
    with torch.device("cpu"):  # transformers asks while it builds a model on the meta device
        for epilogue in _candidates(experts, is_interleaved):
            if _computes(experts, epilogue):
                _found[experts] = (key, epilogue)
                return epilogue
    raise ValueError(
        f"experts_implementation: fused_moe does not compute {type(experts).__name__} with its own _apply_gate; "
        "use grouped_mm"
    )


def _candidates(experts: nn.Module, is_interleaved: bool) -> list["Epilogue"]:
    """Every epilogue of the limits and factors that the module holds; the plain one first."""

    def held(names: tuple[str, ...]) -> list[float]:
        values = [vars(experts).get(name) for name in names]
        return sorted({float(v) for v in values if isinstance(v, int | float) and 0 < v < float("inf")})

    activation = activation_name(experts) if hasattr(experts, "act_fn") else "silu"
    alphas = [1.0, *held(_ALPHA_NAMES)] if activation == "silu" else [1.0]
    settings = itertools.product([None, *held(_LIMIT_NAMES)], alphas, _SHIFTS)
    return [Epilogue(activation, limit, alpha, shift, is_interleaved) for limit, alpha, shift in settings]


def _computes(experts: nn.Module, epilogue: "Epilogue") -> bool:
    """Whether the module's own gate gives what the epilogue gives, on a wide range and close around the limit."""
    h = _grid(epilogue.limit)
    if epilogue.is_interleaved:
        h = torch.stack(h.chunk(2), dim=1).flatten()
    h = h.unsqueeze(0)
    try:
        own = experts._apply_gate(h)
    except (AttributeError, TypeError):
        return False
    wanted = epilogue.apply(h)
    return own.shape == wanted.shape and torch.allclose(own, wanted)


def _grid(limit: float | None) -> Tensor:
    """All pairs of gate and up from -10^6 to 10^6, gates first: a clamp far out is a clamp all the same."""
    far = torch.logspace(2, 6, 9)
    steps = [-far, torch.linspace(-64, 64, 65), far]
    if limit is not None:
        near = limit * torch.tensor([0.5, 0.99, 1.0, 1.01, 2.0])
        steps += [-near, near]
    values = torch.cat(steps)
    gate, up = torch.meshgrid(values, values, indexing="ij")
    return torch.cat([gate.reshape(-1), up.reshape(-1)])
