"""`fused_moe` as an experts implementation of transformers, for this model and any other MoE.

Importing this file registers it, where deepseek_kernels is installed; ``experts_implementation="fused_moe"`` then
picks it. Transformers describes an experts module by flags (`has_gate`, `is_transposed`, ...) that only
its own implementations are written to obey, so whatever the kernel does not compute is refused here by name, at the
first forward pass, rather than computed wrongly.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.utils import logging

try:
    from deepseek_kernels.fused_moe import fused_moe
except ImportError:
    fused_moe = None

logger = logging.get_logger(__name__)

# By class name: transformers renames and moves these between versions, and torch.nn has its own of two of them.
_ACTIVATION_CLASSES = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_pytorch_tanh",
    "NewGELUActivation": "gelu_pytorch_tanh",
    "FastGELUActivation": "gelu_pytorch_tanh",
}


def fused_moe_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return the experts' output; the signature transformers' experts interface calls.

    Args:
        self: An experts module decorated with transformers' ``use_experts_implementation``.
        hidden_states: [T, H].
        top_k_index: [T, K]; at or above E means unused.
        top_k_weights: [T, K].

    Raises:
        ValueError: The module is of a kind that the kernel does not compute.
    """
    _refuse_unsupported(self)
    gate_up_proj, down_proj = self.gate_up_proj, self.down_proj
    if self.is_transposed:
        logger.warning_once(
            f"fused_moe: {type(self).__name__} stores its weights transposed; they are copied on every call"
        )
        gate_up_proj, down_proj = gate_up_proj.transpose(1, 2), down_proj.transpose(1, 2)
    # A norm kept in fp32 may feed experts in bf16 (https://github.com/pytorch/pytorch/issues/174763). Under autocast
    # `fused_moe` casts both.
    is_autocast = not hidden_states.is_meta and torch.is_autocast_enabled(hidden_states.device.type)
    output = fused_moe(
        hidden_states if is_autocast else hidden_states.to(gate_up_proj.dtype),
        gate_up_proj.contiguous(),
        down_proj.contiguous(),
        top_k_index,
        top_k_weights,
        activation=_activation_name(self),
    )
    return output.to(hidden_states.dtype)


def _refuse_unsupported(experts: nn.Module) -> None:
    for flag, refused in (
        ("has_gate", not experts.has_gate),
        ("is_concatenated", not experts.is_concatenated),
        ("has_bias", experts.has_bias),
        # Added to the flags after transformers 5.17.
        ("has_post_expert_norm", vars(experts).get("has_post_expert_norm", False)),
    ):
        if refused:
            value = vars(experts)[flag]
            raise ValueError(
                f"experts_implementation: fused_moe does not compute {type(experts).__name__} with {flag}={value}; "
                "use grouped_mm"
            )
    if type(experts)._apply_gate is not _default_apply_gate and not _gates_by_default(experts):
        raise ValueError(
            f"experts_implementation: fused_moe does not compute {type(experts).__name__} with its own _apply_gate; "
            "use grouped_mm"
        )


@torch.compiler.disable
@torch.no_grad()
def _gates_by_default(experts: nn.Module) -> bool:
    """Whether the module's own `_apply_gate` computes ``act(gate) * up`` all the same, seen on a wide range."""
    steps = torch.linspace(-64, 64, 65, dtype=torch.float32)
    # A clamp far out is a clamp all the same.
    far = torch.logspace(2, 6, 9, dtype=torch.float32)
    steps = torch.cat([-far, steps, far])
    gate, up = (grid.reshape(-1) for grid in torch.meshgrid(steps, steps, indexing="ij"))
    try:
        own = experts._apply_gate(torch.cat([gate, up]).unsqueeze(0)).squeeze(0)
        wanted = experts.act_fn(gate) * up
    except (AttributeError, TypeError):
        return False
    return own.shape == wanted.shape and torch.allclose(own, wanted)


def _activation_name(experts: nn.Module) -> str:
    """The kernel's name for the module's ``act_fn``, a module or a function."""
    act_fn = experts.act_fn
    if isinstance(act_fn, nn.GELU):
        return "gelu_pytorch_tanh" if act_fn.approximate == "tanh" else "gelu"
    if isinstance(act_fn, functools.partial) and act_fn.func is F.gelu:
        return "gelu_pytorch_tanh" if act_fn.keywords.get("approximate") == "tanh" else "gelu"
    if act_fn is F.silu or act_fn is F.gelu:
        return act_fn.__name__
    name = type(act_fn).__name__
    if name not in _ACTIVATION_CLASSES:
        raise ValueError(
            f"experts_implementation: fused_moe does not compute the activation {name} of {type(experts).__name__}, "
            f"only {', '.join(_ACTIVATION_CLASSES)}; use grouped_mm"
        )
    return _ACTIVATION_CLASSES[name]


if fused_moe is not None:
    ALL_EXPERTS_FUNCTIONS.register("fused_moe", fused_moe_experts_forward)
