"""The experts implementations that ``deepseek-moe bench kernels`` runs side by side.

`find_implementations` returns those of transformers' experts interface, ours among them, torch's grouped product used
as well as we know how, and the projects installed beside it: Liger (``pip install liger-kernel``), ScatterMoE and
SonicMoE (from their repositories). Each other project is called in the way its own code calls itself,
with its own tuning; ``benchmarks/kernels.py`` checks that it computes the same thing before anything is timed.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from deepseek_cli.benchmarks.grouped_mm_loop import PlainExperts, grouped_mm_loop
from deepseek_kernels.fused_moe import fused_moe

try:
    from transformers import DeepseekV3Config
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.models.deepseek_v3 import modeling_deepseek_v3

    import modeling_deepseek  # noqa: F401  registers fused_moe

    HAS_TRANSFORMERS = True
except ImportError:  # A machine lent for measuring may have torch and Triton only.
    HAS_TRANSFORMERS = False

# Of the experts' module, hidden states [T, H], indices [T, K] and weights [T, K]; returns [T, H].
Experts = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def find_implementations() -> tuple[dict[str, Experts], dict[str, str]]:
    """Return the implementations that are installed, and why the others are left out.

    Returns:
        Name to implementation, and name to reason.
    """
    if HAS_TRANSFORMERS:
        present = {name: _registered(name) for name in ("eager", *ALL_EXPERTS_FUNCTIONS.keys())}
        absent = {}
    else:
        present, absent = {"fused_moe": _fused_moe}, {"eager": "the package transformers is not installed"}
    present["torch_grouped_mm"] = grouped_mm_loop
    for name, package, forward in (
        ("liger", "liger_kernel", _liger),
        ("scattermoe", "scattermoe", _scattermoe),
        ("sonicmoe", "sonicmoe", _sonicmoe),  # in place of the one transformers takes from the Hub
    ):
        if find_spec(package) is not None:
            present[name] = forward
        elif name not in present:
            absent[name] = f"the package {package} is not installed"
    return present, absent


def make_experts(*, hidden: int, width: int, num_experts: int, num_slots: int) -> nn.Module:
    """Return transformers' own DeepSeek-V3 experts, not initialized; `gate_up_proj` [E, 2I, H], `down_proj` [E, H, I].

    Args:
        hidden: H.
        width: I.
        num_experts: E.
        num_slots: K.
    """
    if not HAS_TRANSFORMERS:
        return PlainExperts(hidden=hidden, width=width, num_experts=num_experts)
    config = DeepseekV3Config(
        hidden_size=hidden, moe_intermediate_size=width, n_routed_experts=num_experts, num_experts_per_tok=num_slots
    )
    return modeling_deepseek_v3.DeepseekV3Experts(config)


@functools.cache
def skips_unused(name: str) -> bool:
    """Return whether an implementation passes over a slot whose index is E; the others get an expert and no weight.

    ``eager`` learned it between transformers 5.17 and 5.23: a tiny case on the CPU tells, where a GPU would be lost.

    Args:
        name: Of the implementation.
    """
    if name != "eager":
        return name in ("fused_moe", "sonicmoe")
    experts = make_experts(hidden=2, width=2, num_experts=2, num_slots=1)
    for parameter in experts.parameters():
        nn.init.ones_(parameter)
    try:
        output = _registered(name)(experts, torch.ones(1, 2), torch.tensor([[2]]), torch.zeros(1, 1))
    except (RuntimeError, IndexError):
        return False
    return bool((output == 0).all())


def _registered(name: str) -> Experts:
    def forward(experts: nn.Module, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        experts.config._experts_implementation = name
        return experts(hidden_states, indices, weights)

    return forward


def _fused_moe(experts: nn.Module, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The public function, where transformers' interface to it is missing."""
    return fused_moe(hidden_states, experts.gate_up_proj, experts.down_proj, indices, weights)


def _liger(experts: nn.Module, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The experts' sum by Liger, as its Qwen3-MoE model computes it."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(
        hidden_states, experts.gate_up_proj, experts.down_proj, indices.int(), weights.to(hidden_states.dtype)
    )


def _scattermoe(experts: nn.Module, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The experts' sum by ScatterMoE, as its own `GLUMLP` computes it."""
    from scattermoe import flatten_sort_count, parallel_linear

    order = flatten_sort_count(indices, num_experts=experts.gate_up_proj.shape[0])
    products = parallel_linear(
        hidden_states, experts.gate_up_proj.permute(0, 2, 1), indices.shape[1], *order, grouped_out=True
    )
    gate, up = products.chunk(2, dim=-1)
    activated = nn.functional.silu(gate) * up
    gates = weights.to(hidden_states.dtype)
    return parallel_linear(activated, experts.down_proj.permute(0, 2, 1), 1, *order, grouped_in=True, gates=gates)


def _sonicmoe(experts: nn.Module, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The experts' sum by an installed SonicMoE, as transformers calls the one from the Hub."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    num_tokens, num_slots = indices.shape
    tokens = torch.arange(num_tokens, device=indices.device, dtype=torch.int32).repeat_interleave(num_slots)
    return moe_general_routing_inputs(
        hidden_states,
        weights.reshape(-1).to(hidden_states.dtype),
        tokens,
        indices.reshape(-1).int(),
        experts.gate_up_proj.permute(1, 2, 0),
        None,
        experts.down_proj.permute(1, 2, 0),
        None,
        E=experts.gate_up_proj.shape[0],
        activation_type=ActivationType.SWIGLU,
        is_inference_mode_enabled=not torch.is_grad_enabled(),
        concat_layout=True,
        stream_id=None,
    )[0]
