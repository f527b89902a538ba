"""The routers of any MoE model of transformers, and which experts they choose, read from what they return.

`TrainingFigures` hooks them. transformers names, per model, the modules whose output it records as router logits and
where in the output these stand; how the choice is returned beside them differs. Surprising: some models return none,
and make it elsewhere (DBRX, Doge, ERNIE 4.5 VL): these routers are found, but nothing can be counted.
"""

import torch
from torch import nn


def find_routers(model: nn.Module) -> list[tuple[nn.Module, int]]:
    """Return the modules whose output transformers records as router logits, each with the logits' place in it.

    A module that has another of them inside (JetMoe's attention passes on its router's logits) is left out.

    Args:
        model: A model, possibly wrapped for distributed training.
    """
    places = {}
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


def read_choice(output: object, place: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return `router_logits` `[T, E]` and the experts' load `[E]` int64; None if the output does not tell it.

    No bincount, boolean index or comparison of values here: they would wait for the GPU.

    Args:
        output: What a router returned.
        place: Where in it the logits stand.
    """
    if not isinstance(output, (tuple, list)):
        return None
    router_logits, others = output[place], [*output[:place], *output[place + 1 :]]
    num_experts = router_logits.shape[-1]
    if place == 0 and len(others) >= 2 and not others[1].is_floating_point():
        load = _load_of_indices(others[0], others[1], num_experts)
    elif tables := [part for part in others if getattr(part, "shape", None) == router_logits.shape]:
        # One column an expert, zero where it is not chosen: Llama 4's scores, Switch's mask. NLLB-MoE has a mask of
        # the first expert and, behind it, the weights of both.
        load = (tables[-1] != 0).flatten(0, -2).sum(0)
    elif counts := [part for part in others if isinstance(part, list) and len(part) == num_experts]:
        load = torch.tensor(counts[0], device=router_logits.device)  # JetMoe
    else:
        return None
    return router_logits.reshape(-1, num_experts), load


def _load_of_indices(topk_weights: torch.Tensor, topk_indices: torch.Tensor, num_experts: int) -> torch.Tensor:
    # An unused slot has weight 0 or the index E.
    is_used = (topk_weights != 0) & (topk_indices < num_experts)
    load = torch.zeros(num_experts, dtype=torch.int64, device=topk_indices.device)
    return load.scatter_add_(0, topk_indices.clamp(max=num_experts - 1).flatten(), is_used.flatten().long())


def entropy_sum(router_logits: torch.Tensor) -> torch.Tensor:
    """Return the entropies of the softmax over all experts, in nats, summed over tokens.

    Args:
        router_logits: `[T, E]`; where a model records probabilities in their place (Gemma 4), these.
    """
    logits = router_logits.float()
    is_probability = ((logits >= 0).all() & ((logits.sum(-1) - 1).abs() < 1e-3).all()).to(logits)
    shares = is_probability * logits + (1 - is_probability) * logits.softmax(-1)
    return torch.special.entr(shares.clamp(min=0)).sum()
