"""The tile search under its documented name; it lives in ``deepseek_kernels.gpu.tune``."""

from deepseek_kernels.gpu.tune import tune

__all__ = ["tune"]
