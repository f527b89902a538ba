"""Where the routers, experts and balancing biases of a transformers MoE are: one table for all families.

What balances, counts, quantizes, prunes or replays experts asks `find_moe_layers` and knows no family by itself. Most
of the answer is read from the modules: transformers marks experts classes by flags, a router stands beside its experts
and returns `(router_logits, topk_weights, topk_indices, ...)`. `ROWS` holds what they do not say. `docs/families.md`
is made from both.

Axes: T tokens, E experts, K experts per token.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

# Attributes under which families keep the bias that only the choice of experts sees.
BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "balancing_biases")
_ROUTER_NAMES = ("gate", "router")
_SHARED_NAMES = ("shared_experts", "shared_expert", "shared_mlp")
# What PEFT's modules_to_save puts behind a module's name.
_COPY = re.compile(r"\.(original_module|modules_to_save\..*)$")
# Attributes of routers that hold their own scoring function, or the name of one.
_SCORE_ATTRIBUTES = ("scoring_func", "score_fn", "scoring_function", "expert_selection_fn")


def _sqrt_softplus(logits: torch.Tensor) -> torch.Tensor:
    return F.softplus(logits).sqrt()


SCORES = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": _sqrt_softplus,
    # The router returns softmax scores in place of logits.
    "probabilities": lambda scores: scores,
}


@dataclass(frozen=True)
class Row:
    """What a router's modules do not say of themselves.

    Attributes:
        scores: Key of `SCORES`.
        reason: How that is known.
    """

    scores: str
    reason: str


# By router class. Everything else: the router's own scoring attribute; sigmoid beside a balancing bias, else softmax.
ROWS = {
    "DiffusionGemmaTextRouter": Row("probabilities", "returns softmax scores in place of logits"),
    "Ernie4_5_MoeTopKRouter": Row("softmax", "softmax scores beside a bias"),
    "Ernie4_5_VLMoeMoeTopKRouter": Row("softmax", "softmax scores beside a bias"),
    "FlintTopKRouter": Row("sigmoid", "sigmoid scores without a bias"),
    "Gemma4TextRouter": Row("probabilities", "returns softmax scores in place of logits"),
    "Lfm2MoeTopKRouter": Row("sigmoid", "sigmoid scores, the bias is optional"),
    "ZayaRouter": Row("softmax", "softmax scores beside a bias; the last class skips the experts"),
}


@dataclass(frozen=True)
class MoeLayer:
    """One layer of routed experts.

    Attributes:
        name: Of the block that holds router and experts, as in `named_modules`, without wrappers.
        block: That block.
        router: The router that is in force; under PEFT's `modules_to_save` the trained copy.
        experts: The module that transformers' experts interface calls, unwrapped; None where the family has none.
        decoder: The innermost `PreTrainedModel` around the block; what runs it is one call of this.
        logits_place: Where in the router's output the logits stand.
        bias_owner: The module that holds the balancing bias, and its attribute; None where there is no bias.
    """

    name: str
    block: nn.Module
    router: nn.Module
    experts: nn.Module | None
    decoder: nn.Module
    logits_place: int = 0
    bias_owner: tuple[nn.Module, str] | None = None

    @property
    def bias(self) -> torch.Tensor | None:
        """The balancing bias as it is stored, flat; None where there is none. Zaya's has one entry more than E."""
        if self.bias_owner is None:
            return None
        owner, name = self.bias_owner
        bias = getattr(owner, name)
        return None if bias is None else bias.detach().flatten()

    @property
    def router_name(self) -> str:
        """The router's attribute in the block, what PEFT's `modules_to_save` takes."""
        return next((name for name, _ in self.block.named_children() if name in _ROUTER_NAMES), "")

    @property
    def num_experts(self) -> int | None:
        """E, where the modules say it; experts that are split over processes say their share, so then the router."""
        is_split = self.experts is not None and vars(self.experts).get("_is_expert_parallel", False)
        modules = (self.router,) if is_split else (self.experts, self.router)
        named = [vars(module).get("num_experts") for module in modules if module is not None]
        return next((number for number in named if isinstance(number, int)), None)

    @property
    def shared(self) -> tuple[nn.Module, ...]:
        """Experts that every token uses."""
        return tuple(child for name, child in self.block.named_children() if name in _SHARED_NAMES)

    @property
    def scores(self) -> str:
        """Key of `SCORES`: what makes a token's scores of its router logits."""
        row = next((ROWS[cls.__name__] for cls in type(self.router).__mro__ if cls.__name__ in ROWS), None)
        if row is not None:
            return row.scores
        own = next((getattr(self.router, name) for name in _SCORE_ATTRIBUTES if hasattr(self.router, name)), None)
        if own is not None:
            return own if isinstance(own, str) else _name_of(own)
        return "softmax" if self.bias_owner is None else "sigmoid"

    def compute_scores(self, router_logits: torch.Tensor) -> torch.Tensor:
        """Return `scores` `[T, E]` of `router_logits` `[T, E]`, in fp32, without bias."""
        return SCORES[self.scores](router_logits.float())


def find_moe_layers(model: nn.Module) -> list[MoeLayer]:
    """Return a model's layers of routed experts in order, of ours or of any family of transformers.

    Found are experts classes that transformers decorates and, for older families, routers whose output transformers
    records as router logits.

    Args:
        model: Any module, wrapped by PEFT or for distributed training or not.
    """
    modules = dict(model.named_modules())
    found = {}
    for name, module in modules.items():
        if _is_experts(module):
            layer = _layer_around(modules, name, module)
            if layer is not None:
                found[layer.router] = layer
    names = {module: name for name, module in modules.items()}
    for router, place in _recorded_routers(model):
        if any(part in found for part in router.modules() if part is not router):
            continue  # a block that passes on the logits of the routers inside (Ernie 4.5 VL)
        name = _COPY.sub("", names[router])
        if router not in found and _in_force(modules[name]) is router:
            block_name = name.rpartition(".")[0]
            decoder = _innermost_model(modules, name)
            found[router] = MoeLayer(block_name, modules[block_name], router, None, decoder, place)
    order = {module: number for number, module in enumerate(modules.values())}
    return sorted(found.values(), key=lambda layer: order[layer.router])


def _is_experts(module: nn.Module) -> bool:
    # What transformers' use_experts_implementation writes into each instance.
    return {"is_transposed", "has_gate", "is_concatenated"} <= vars(module).keys()


def _layer_around(modules: dict[str, nn.Module], name: str, experts: nn.Module) -> MoeLayer | None:
    for block_name in _parents(name):
        block = modules[block_name]
        router = next((child for part, child in block.named_children() if part in _ROUTER_NAMES), None)
        if router is not None:
            router = _in_force(router)
            return MoeLayer(
                name=block_name,
                block=block,
                router=router,
                experts=experts,
                decoder=_innermost_model(modules, name),
                bias_owner=_find_bias(router, block),
            )
    return None


def _in_force(module: nn.Module) -> nn.Module:
    """The module inside PEFT's wrappers: what an adapter wraps, or the copy that `modules_to_save` trains."""
    while True:
        if "base_layer" in module._modules:
            module = module.base_layer
        elif "original_module" in module._modules:
            copies = [
                module.modules_to_save[name] for name in module.active_adapters if name in module.modules_to_save
            ]
            module = copies[0] if copies else module.original_module
        else:
            return module


def _find_bias(router: nn.Module, block: nn.Module) -> tuple[nn.Module, str] | None:
    for module in (*router.modules(), block):
        for name in BIAS_NAMES:
            if isinstance(getattr(module, name, None), torch.Tensor):
                return module, name
    return None


def _parents(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _innermost_model(modules: dict[str, nn.Module], name: str) -> nn.Module:
    parents = [modules[parent] for parent in _parents(name)]
    return next((parent for parent in parents if isinstance(parent, PreTrainedModel)), modules[""])


def _recorded_routers(model: nn.Module) -> list[tuple[nn.Module, int]]:
    """Modules whose output transformers records as router logits, with the logits' place in it.

    A module that has another of them inside (JetMoe's attention passes on its router's logits) is left out.
    """
    places: dict[Any, int] = {}
    for module in model.modules():
        recorders = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
        for recorder in recorders if isinstance(recorders, list) else [recorders]:
            places[getattr(recorder, "target_class", recorder)] = getattr(recorder, "index", 0)
    found = {}
    for module in model.modules():
        recorded = next((cls for cls in type(module).__mro__ if cls in places), None)  # FSDP2 makes subclasses
        if recorded is not None:
            found[module] = places[recorded]
    return [
        (module, place)
        for module, place in found.items()
        if not any(part in found for part in module.modules() if part is not module)
    ]


def _name_of(function: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """The name in `SCORES` of a router's scoring function, told by what it computes."""
    logits = torch.linspace(-3, 3, 7).unsqueeze(0)
    for name, score in SCORES.items():
        if torch.allclose(function(logits).float(), score(logits)):
            return name
    raise ValueError(f"scores: got {function}, expected one of {', '.join(SCORES)}; add a row to ROWS")
