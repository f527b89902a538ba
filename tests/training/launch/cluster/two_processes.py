"""What two processes of FSDP2 on gloo allocate and send in one optimizer step; started by test_two_processes.py."""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM


def main() -> None:
    settings, batch, length, passes = json.loads(sys.argv[1])
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DeepseekForCausalLM(DeepseekConfig.from_preset("debug", **settings))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters())

    sent = {"gathered": 0, "reduced": 0}
    gather, reduce = dist.all_gather_single, dist.reduce_scatter_single

    def counted_gather(output, input, *args, **kwargs):
        sent["gathered"] += output.nbytes - input.nbytes
        return gather(output, input, *args, **kwargs)

    def counted_reduce(output, input, *args, **kwargs):
        sent["reduced"] += input.nbytes - output.nbytes
        return reduce(output, input, *args, **kwargs)

    dist.all_gather_single, dist.reduce_scatter_single = counted_gather, counted_reduce
    ids = torch.randint(3, 500, (batch, length))
    for _ in range(passes):
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    local = [p.to_local() for p in model.parameters()]
    states = [v.to_local() for s in optimizer.state.values() for v in s.values() if v.ndim]
    gradients = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
    kept = {
        "weights": sum(p.nbytes for p in local),
        "moments": sum(v.nbytes for v in states),
        "gradients": sum(g.nbytes for g in gradients),
    }
    if int(os.environ["RANK"]) == 0:
        print(json.dumps(sent | kept))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
