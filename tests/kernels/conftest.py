"""What the tests of the kernels share."""

import pytest
import torch

_GUARD = 64


@pytest.fixture
def guarded_buffers(monkeypatch):
    """Fill every uninitialized buffer with NaN or a huge index, fence it with the same, and look at the fences after.

    What a kernel leaves unwritten shows in its results, what it writes beyond the end shows in the fences: neither
    Triton's interpreter nor a GPU complains of itself.
    """
    made = []

    def fence(tensor):
        if tensor.dtype == torch.uint8:  # NF4's codes: no kernel writes bytes
            return tensor
        poison = float("nan") if tensor.is_floating_point() else 2**30
        whole = torch.full((tensor.numel() + 2 * _GUARD,), poison, dtype=tensor.dtype, device=tensor.device)
        made.append(whole)
        return whole[_GUARD : _GUARD + tensor.numel()].view(tensor.shape)

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, original=original, **k: fence(original(*a, **k)))
    yield made
    monkeypatch.undo()
    for whole in made:
        for fence_part in (whole[:_GUARD], whole[-_GUARD:]):
            is_whole = fence_part.isnan() if whole.is_floating_point() else fence_part == 2**30
            assert is_whole.all(), f"a kernel wrote outside a buffer of {whole.numel() - 2 * _GUARD} {whole.dtype}"
