"""The memory that a whole training step saves, as the process grows, and what a layer keeps."""

import pytest
import torch

from deepseek_cli.benchmarks import step_memory


@pytest.mark.slow
def test_a_step_saves_most_of_what_the_layers_promise_or_more(monkeypatch, capsys):
    monkeypatch.setattr(step_memory, "DTYPES", ("float32",))
    assert step_memory.main([]) == 0
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].split("|")]
    assert row[1] == "float32" and float(row[6]) > 0.75


@pytest.mark.parametrize("implementation", step_memory.IMPLEMENTATIONS)
def test_what_a_layer_keeps(implementation):
    """By the formulas of the page, in float32: 2(2H + 4KI) and at most 2K(4H + 8I) bytes per token."""
    found = step_memory.measure(implementation, torch.float32, 256)
    fused, grouped = 2 * (2 * 256 + 4 * 8 * 128), 2 * 8 * (4 * 256 + 8 * 128)
    per_token = found["kept"] / 256
    # Router weights and the order of the slots come on top.
    assert (fused if implementation == "fused_moe" else 0.8 * grouped) <= per_token
    assert per_token <= (1.15 * fused if implementation == "fused_moe" else grouped)
