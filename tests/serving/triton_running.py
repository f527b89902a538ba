"""Tiny models in a real Triton server on free ports of this machine, from what `make serve-setup` installed."""

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from endpoint_server import make_model, make_tokenizer

from deepseek_records.exit_codes import RunFailedError
from modeling_deepseek import DeepseekForSequenceClassification

CLIENTS = Path(__file__).resolve().parents[2] / "build" / "serving" / "clients"
EMBEDDED_SAFETY = "deepseek_training.rewards.safety_classifier:EmbeddedSafety"
LIMITS = {"max_tokens": 200, "cache_tokens": 2048, "max_running": 8, "max_waiting": 8, "timeout_s": 60.0}


def find_triton():
    """The installation; skips the test where there is none."""
    from deepseek_serving.triton_server.installation import find_installation

    try:
        return find_installation()
    except ValueError as error:
        pytest.skip(str(error))


def triton_client(module):
    """A module of tritonclient, which lies outside of the environment; skips the test where it is not installed."""
    if str(CLIENTS) not in sys.path:
        sys.path.append(str(CLIENTS))  # last: numpy is there, too
    return pytest.importorskip(f"tritonclient.{module}", reason="make serve-setup installs tritonclient")


def save_models(folder):
    """A causal model and a reward model with one tokenizer; their paths."""
    model = make_model("ours")
    model.save_pretrained(folder / "model")
    torch.manual_seed(2)
    config = type(model.config)(**model.config.to_dict() | {"num_labels": 1})
    DeepseekForSequenceClassification(config).save_pretrained(folder / "reward")
    for name in ("model", "reward"):
        make_tokenizer().save_pretrained(folder / name)
    return folder / "model", folder / "reward"


def describe(folder, kinds):
    """The served models, saved under a folder."""
    from deepseek_serving.triton_server.repository import ServedModel

    model, reward = save_models(folder)
    checkpoints = dict.fromkeys(("score", "embed", "generate"), str(model))
    checkpoints |= {"reward": str(reward), "safety": EMBEDDED_SAFETY}
    return [ServedModel(kind, checkpoints[kind], 256, LIMITS if kind == "generate" else {}) for kind in kinds]


@contextmanager
def triton(folder, kinds, *, grace_s=5.0, batching=None, **listening):
    """A server for the kinds, with its supervisor, that must leave nothing behind."""
    from deepseek_serving.triton_server.ports import Listening, find_free_ports
    from deepseek_serving.triton_server.process import TritonProcess
    from deepseek_serving.triton_server.repository import BatchingSettings, write_repository
    from deepseek_serving.triton_server.supervision import Supervisor

    installation = find_triton()
    repository = write_repository(folder / "repository", describe(folder, kinds), batching or BatchingSettings())
    process = TritonProcess(installation, repository, Listening(*find_free_ports(3), **listening), grace_s=grace_s)
    supervisor = Supervisor(process, load_timeout_s=200.0)
    try:
        process.start()
        try:
            supervisor.begin()
        except RunFailedError as error:
            raise AssertionError(process.log.read_text()[-4000:]) from error
        yield process, supervisor
    finally:
        process.stop()
    assert process._group() == [] and not process.is_alive
    assert left_in_shared_memory(process) == []


def left_in_shared_memory(process):
    """Names of the server's shared memory."""
    return [path.name for path in Path("/dev/shm").glob("*") if process._prefix in path.name]
