"""Whether Triton computes a call, and the modules that then do.

`fused_moe` and `fused_moe_lora` ask here. Without Triton on a system there is only the CPU path.
"""

from torch import Tensor

try:
    from deepseek_kernels.gpu import adapters as adapters_gpu
    from deepseek_kernels.gpu import experts as experts_gpu
    from deepseek_kernels.gpu.triton_numerics import IS_INTERPRETED
except ImportError:  # no Triton on this system; the CPU path needs none
    adapters_gpu = None  # type: ignore[assignment]
    experts_gpu = None  # type: ignore[assignment]
    IS_INTERPRETED = False


def runs_triton(tensor: Tensor) -> bool:
    """Return whether Triton computes this: on a GPU, or on a CPU in a process started with TRITON_INTERPRET=1.

    Args:
        tensor: Any operand of the call.
    """
    return experts_gpu is not None and (tensor.is_cuda or IS_INTERPRETED)
