"""`fused_moe` as transformers' way to bring split experts their tokens.

Importing this file registers it, where transformers lets one be registered (5.23) and deepseek_kernels is installed;
``DistributedConfig(ep_size=8, fsdp_size=8, ep_implementation="fused_moe")`` then picks it, with any
``experts_implementation`` and for any MoE model with an expert-parallel plan.

``deepseek_kernels.expert_parallel`` says how it differs from transformers' ``all_to_all``. Where the processes share
one batch (``ep_size == tp_size``) and nothing is trained, no token travels: each process computes its own experts'
rows of the batch, in buffers of their number, and the results are added up. What trains under tensor parallelism is
left to transformers.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

try:
    from transformers.distributed.expert_parallel import AllToAllEP, EPImplementation, EPImplementationInterface

    from deepseek_kernels.expert_parallel import exchange_experts
except ImportError:
    EPImplementation = None


def computes_unused_slots(experts: nn.Module) -> bool:
    """Return whether a slot without an expert would go wrong where these experts are split.

    Args:
        experts: An experts module, split or not.
    """
    is_split = vars(experts).get("_is_expert_parallel", False)  # a flag that 5.17 has not
    return is_split and not vars(experts).get("skips_unused_slots", False)


if EPImplementation is not None:

    class FusedExpertParallel(EPImplementation):
        """Splits experts over processes and computes them by `fused_moe`'s means; made by transformers.

        Args:
            experts: The module, with this process's experts only.
            ep_mesh: The processes that share one set of experts.
            tp_mesh: Those that share one batch.
        """

        def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            self.config = experts.config
            self.over_tensor_parallel = AllToAllEP(experts, ep_mesh, tp_mesh) if tp_mesh.size() > 1 else None
            experts.skips_unused_slots = self.over_tensor_parallel is None

        def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            """Return the experts' weighted sum for this process's tokens.

            Args:
                hidden_states: [T, H].
                top_k_index: [T, K] over the experts of all processes; as many as there are means unused.
                top_k_weights: [T, K].
            """
            is_trained = torch.is_grad_enabled() and hidden_states.requires_grad
            if self.shares_batch and not is_trained:
                return self._own_share(hidden_states, top_k_index, top_k_weights)
            if self.over_tensor_parallel is not None:
                return self.over_tensor_parallel(hidden_states, top_k_index, top_k_weights)
            inputs = (hidden_states, top_k_index, top_k_weights)
            return exchange_experts(*inputs, self.experts_forward, self.num_local_experts, self.ep_mesh.get_group())

        def _own_share(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            """The sum over the processes of what each one's experts give for the batch that they share."""
            is_own = top_k_index // self.num_local_experts == self.ep_mesh.get_local_rank()
            local = torch.where(is_own, top_k_index % self.num_local_experts, self.num_local_experts)
            weights = top_k_weights.masked_fill(~is_own, 0.0)
            bound = {}
            if self.config._experts_implementation == "fused_moe":
                bound["max_rows"] = self._most_rows(is_own)
            output = self.experts_forward(hidden_states, local, weights, **bound)
            torch.distributed.all_reduce(output, group=self.ep_mesh.get_group())
            return output

        def _most_rows(self, is_own: Tensor) -> int:
            """How many slots are this process's, or, where the host may not wait, can be."""
            num_tokens, num_slots = is_own.shape
            if is_own.is_cuda and torch.cuda.is_current_stream_capturing():
                return num_tokens * min(num_slots, self.num_local_experts)
            return int(is_own.sum())

    EPImplementationInterface.register("fused_moe", FusedExpertParallel)
