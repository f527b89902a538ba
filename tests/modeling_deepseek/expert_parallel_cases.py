"""Batches for two processes, and experts whole or split, for `test_expert_parallel` and its worker."""

import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from modeling_deepseek import DeepseekConfig

NUM_EXPERTS, HIDDEN, WIDTH = 6, 12, 8
EXPERTS_IMPLEMENTATIONS = ("fused_moe", "eager")
# Tokens of each process, slots, first and last expert chosen; 6 is an unused slot.
CASES = {
    "some unused": ((9, 5), 3, (0, 6)),
    "one expert per token": ((7, 4), 1, (0, 5)),
    "no tokens in one process": ((6, 0), 2, (0, 5)),
    "nothing for one process": ((4, 3), 2, (3, 5)),
    "nothing at all": ((3, 2), 2, (6, 6)),
    "many": ((200, 150), 4, (0, 6)),
}


def make_experts(name, implementation, rank=0, size=1):
    """The experts `rank` of `size` has of this case's."""
    num_local = NUM_EXPERTS // size
    config = DeepseekConfig.from_preset(
        "debug", n_routed_experts=num_local, hidden_size=HIDDEN, moe_intermediate_size=WIDTH
    )
    config._experts_implementation = implementation
    experts = DeepseekV3Experts(config).double()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in experts.parameters():
            whole = torch.randn(NUM_EXPERTS, *parameter.shape[1:], generator=generator, dtype=torch.float64)
            parameter.copy_(whole[rank * num_local : (rank + 1) * num_local])
    return experts


def make_inputs(name):
    """Hidden states, expert ids and weights of each process."""
    sizes, num_slots, (first, last) = CASES[name]
    generator = torch.Generator().manual_seed(7)
    inputs = []
    for num_tokens in sizes:
        x = torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float64)
        ids = torch.randint(first, last + 1, (num_tokens, num_slots), generator=generator)
        weights = torch.rand(num_tokens, num_slots, generator=generator, dtype=torch.float64)
        inputs.append((x, ids, weights))
    return inputs


def run(function, experts, inputs):
    """Output, the gradients of hidden states and weights, and those of the experts' parameters."""
    x, ids, weights = inputs
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    output = function(x, ids, weights)
    if output.requires_grad:  # transformers' loop over the experts touches none that nobody chose
        output.backward(output.detach().cos())
    leaves = (x, weights, *experts.parameters())
    return [output.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)]
