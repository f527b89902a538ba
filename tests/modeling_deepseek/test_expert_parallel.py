"""Experts split over two processes give what whole ones give: values and every gradient, for batches of all kinds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers.distributed.expert_parallel")

from expert_parallel_cases import CASES, EXPERTS_IMPLEMENTATIONS, make_experts, make_inputs, run
from transformers.distributed.expert_parallel import EPImplementationInterface

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parent / "expert_parallel_worker.py"


def launched(folder, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(WORKER)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return launched(tmp_path_factory.mktemp("split"))


def assert_equals_whole(split, name, implementation):
    whole = make_experts(name, "eager")
    wanted = [run(whole, whole, inputs) for inputs in make_inputs(name)]
    # Gradients of both processes' tokens have added up in the experts.
    for rank, found in enumerate(split):
        *values, shared = found[name, implementation]
        for got, want in zip(values[:3], wanted[rank][:3], strict=True):
            torch.testing.assert_close(got, want)
        for got, want in zip(values[3:], wanted[1][3:], strict=True):
            torch.testing.assert_close(got, want[rank * got.shape[0] : (rank + 1) * got.shape[0]])
        torch.testing.assert_close(shared, wanted[0][0])


@pytest.mark.parametrize("implementation", EXPERTS_IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_split_experts_equal_whole_ones(name, implementation, split):
    assert_equals_whole(split, name, implementation)


def test_less_is_kept_than_by_transformers_exchange(split):
    """Not the rows that come back, [T*K, H], nor their copy in the order of the slots."""
    for rank, found in enumerate(split):
        ours, theirs = found["kept"]
        num_tokens = make_inputs("many")[rank][0].shape[0]
        assert ours <= theirs - num_tokens * 4 * 12, (ours, theirs)


@pytest.mark.timeout(900)
def test_by_tritons_kernels(tmp_path):
    found = launched(tmp_path, TRITON_INTERPRET="1")
    for name in CASES:
        assert_equals_whole(found, name, "fused_moe")


def test_transformers_knows_it():
    assert "fused_moe" in EPImplementationInterface()
