"""What two processes of gloo send to one another's experts in one step; started by test_two_processes.py."""

import json
import os
import sys

import torch
import torch.distributed as dist

from deepseek_kernels.expert_parallel import exchange_experts


def main() -> None:
    hidden, experts, slots, tokens, layers = json.loads(sys.argv[1])
    dist.init_process_group("gloo")
    rank, exchange, sent = dist.get_rank(), dist.all_to_all_single, 0

    def counted(output, input, receive=None, send=None, **kwargs):
        nonlocal sent
        send = send or [len(input) // 2] * 2
        sent += send[1 - rank] * input[:1].nbytes
        return exchange(output, input, receive, send, **kwargs)

    dist.all_to_all_single = counted
    torch.manual_seed(rank)
    rows = torch.randn(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    states = rows
    for _ in range(layers):
        chosen = torch.rand(tokens, experts).topk(slots).indices
        weights = torch.rand(tokens, slots, dtype=torch.bfloat16, requires_grad=True)
        states = exchange_experts(states, chosen, weights, lambda r, _, w: r * w, experts // 2, dist.group.WORLD)
    states.sum().backward()
    print(json.dumps(sent) if int(os.environ["RANK"]) == 0 else "", end="", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
