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
EXCHANGING = Path(__file__).parent / "two_exchanging.py"
SIZES = [{}, {"n_routed_experts": 24, "num_hidden_layers": 5}, {"hidden_size": 96, "tie_word_embeddings": False}]


def run_two(worker, arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    done = subprocess.run([*command, json.dumps(arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("settings", SIZES, ids=str)
def test_fsdp2_allocates_and_sends_what_the_plan_says(settings):
    found = run_two(WORKER, [settings, 2, 16, 3])

    shape = read_shape(DeepseekConfig.from_preset("debug", **settings), "debug")
    layout = Layout(data=2, zero=3, batch=12, micro_batch=2, length=16)
    memory = estimate_memory(shape, layout)
    assert found["gradients"] == pytest.approx(memory.gradients, rel=0.05)
    assert found["weights"] + found["moments"] == pytest.approx(memory.optimizer, rel=0.05)
    sent = estimate_traffic(shape, layout, find_device("h100")).data
    assert found["gathered"] + found["reduced"] == pytest.approx(sent.node_bytes + sent.network_bytes, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("hidden", "experts", "slots", "layers"), [(64, 16, 4, 2), (96, 8, 2, 3), (32, 64, 8, 1)])
def test_the_exchange_sends_what_the_plan_says(hidden, experts, slots, layers):
    """Every expert as likely, in bf16; weights and counts, which the plan leaves out, travel as well."""
    tokens = 2048
    sent = run_two(EXCHANGING, [hidden, experts, slots, tokens, layers])
    settings = {"hidden_size": hidden, "n_routed_experts": experts, "num_hidden_layers": layers}
    settings |= {"num_experts_per_tok": slots, "min_experts_per_tok": slots, "first_k_dense_replace": 0}
    shape = read_shape(DeepseekConfig.from_preset("debug", **settings), "debug")
    layout = Layout(data=2, expert=2, batch=2, micro_batch=1, length=tokens)
    planned = estimate_traffic(shape, layout, find_device("h100")).experts
    assert sent == pytest.approx(planned.node_bytes + planned.network_bytes, rel=0.05)
