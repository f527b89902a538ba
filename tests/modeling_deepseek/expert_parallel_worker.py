"""One process of two that share experts: computes every case, and saves what came out for `test_expert_parallel`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from expert_parallel_cases import CASES, EXPERTS_IMPLEMENTATIONS, make_experts, make_inputs, run
from torch.distributed.device_mesh import init_device_mesh
from transformers.distributed.expert_parallel import AllToAllEP

from modeling_deepseek.fused_expert_parallel import FusedExpertParallel


def kept(split, inputs):
    """Numbers kept for the backward pass, parameters and integers apart."""
    x, ids, weights = inputs
    storages = {}

    def note(tensor):
        if tensor.is_floating_point() and not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        split(x.clone().requires_grad_(), ids.clamp(max=5), weights.clone().requires_grad_())
    return sum(storages.values())


def main(folder):
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    together = init_device_mesh("cpu", (size,), mesh_dim_names=("ep",))
    alone = init_device_mesh("cpu", (size, 1), mesh_dim_names=("fsdp", "tp"))["tp"]
    found = {}
    for name in CASES:
        for implementation in EXPERTS_IMPLEMENTATIONS:
            experts = make_experts(name, implementation, rank, size)
            split = FusedExpertParallel(experts, together, alone)
            found[name, implementation] = run(split, experts, make_inputs(name)[rank])
            with torch.no_grad():
                shared = FusedExpertParallel(experts, together, together)
                found[name, implementation].append(shared(*make_inputs(name)[0]))
    experts, inputs = make_experts("many", "fused_moe", rank, size), make_inputs("many")[rank]
    found["kept"] = [kept(one(experts, together, alone), inputs) for one in (FusedExpertParallel, AllToAllEP)]
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


main(sys.argv[1])
