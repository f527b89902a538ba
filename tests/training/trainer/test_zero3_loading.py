"""Loading a checkpoint after ZeRO-3 was announced, when parameters are empty until they are needed."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("deepspeed", reason="pip install 'deepseek-moe[deepspeed]'")
pytestmark = pytest.mark.slow  # a process of its own: DeepSpeed is announced once

CODE = """
import sys
import deepspeed
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from modeling_deepseek import DeepseekConfig
from modeling_deepseek import DeepseekForCausalLM

model = DeepseekForCausalLM(DeepseekConfig.from_preset("debug"))
model.save_pretrained(sys.argv[1])
deepspeed.init_distributed("gloo")
config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
loaded = DeepseekForCausalLM.from_pretrained(sys.argv[1])
for one, other in zip(model.parameters(), loaded.parameters(), strict=True):
    with deepspeed.zero.GatheredParameters([other]):
        assert (one == other).all()
"""


def test_a_checkpoint_loads_into_split_parameters(tmp_path):
    process = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    environment = {**os.environ, **process, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
