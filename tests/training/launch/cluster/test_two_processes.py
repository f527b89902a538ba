"""The plan against what two real processes allocate and send."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_training.launch.cluster.devices import find_device
from deepseek_training.launch.cluster.layout import Layout
from deepseek_training.launch.cluster.memory import estimate_memory
from deepseek_training.launch.cluster.shape import read_shape
from deepseek_training.launch.cluster.traffic import estimate_traffic
from modeling_deepseek import DeepseekConfig

WORKER = Path(__file__).parent / "two_processes.py"
SIZES = [{}, {"n_routed_experts": 24, "num_hidden_layers": 5}, {"hidden_size": 96, "tie_word_embeddings": False}]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SIZES, ids=str)
def test_fsdp2_allocates_and_sends_what_the_plan_says(settings):
    arguments = json.dumps([settings, 2, 16, 3])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    done = subprocess.run([*command, arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])

    shape = read_shape(DeepseekConfig.from_preset("debug", **settings), "debug")
    layout = Layout(data=2, zero=3, batch=12, micro_batch=2, length=16)
    memory = estimate_memory(shape, layout)
    assert found["gradients"] == pytest.approx(memory.gradients, rel=0.05)
    assert found["weights"] + found["moments"] == pytest.approx(memory.optimizer, rel=0.05)
    sent = estimate_traffic(shape, layout, find_device("h100")).data
    assert found["gathered"] + found["reduced"] == pytest.approx(sent.node_bytes + sent.network_bytes, rel=0.05)
