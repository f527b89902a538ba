"""A GPU that is not here, for tests that compile what the host code would launch on it."""

from triton.backends.compiler import GPUTarget


class AbsentGpu:
    """What Triton asks its driver before it compiles a launch."""

    def __init__(self, target):
        self.target = GPUTarget(*target)

    def get_current_device(self):
        """A name for each target: Triton keeps what it compiled by device, and would not for another one."""
        return self.target.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target
