"""The recipes for ``accelerate launch``, and the refusal to train under another engine than was asked for."""

from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from deepseek_training.stages.dpo import DpoRecipe, dpo
from deepseek_training.trainer.distributed_engine import (
    LAUNCH_FOLDER,
    check_engine,
    launch_config,
    prepare_engine,
    refuse_fsdp,
    refuse_split_adapter,
    requested_engine,
)
from deepseek_training.trainer.expert_parallel import check_expert_parallel
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

ENGINES = {"expert_parallel": "MULTI_GPU", "fsdp2": "FSDP", "fsdp2_sharded": "FSDP", "zero3": "DEEPSPEED"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_accelerate_reads_every_recipe():
    assert {path.stem for path in LAUNCH_FOLDER.glob("*.yaml")} == set(ENGINES)
    for name, engine in ENGINES.items():
        assert load_config_from_file(str(launch_config(name))).distributed_type == engine
    with pytest.raises(
        ValueError, match="got 'megatron', expected one of expert_parallel, fsdp2, fsdp2_sharded, zero3"
    ):
        launch_config("megatron")


def test_the_recipes_name_our_modules():
    """A name that no module bears would be passed over without a word."""
    classes = {type(module).__name__ for module in DeepseekForCausalLM(DeepseekConfig.from_preset("debug")).modules()}
    leaves = yaml.safe_load(launch_config("zero3").read_text())["deepspeed_config"]["deepspeed_moe_layer_cls_names"]
    assert set(leaves.split(",")) <= classes
    assert set(DeepseekForCausalLM._no_split_modules) <= classes


def test_another_engine_than_asked_for_is_refused(monkeypatch):
    alone = SimpleNamespace(distributed_type=DistributedType.NO, num_processes=1)
    check_engine(alone)
    assert requested_engine() is None and prepare_engine() == {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but the trainer knows 1"):
        check_engine(alone)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    replicated = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, num_processes=2)
    with pytest.raises(ValueError, match="FSDP was asked for, but the trainer runs under MULTI_CPU"):
        check_engine(replicated)
    check_engine(SimpleNamespace(distributed_type=DistributedType.FSDP, num_processes=2))


@pytest.mark.parametrize(
    ("size", "num_processes", "change", "message"),
    [
        (2, 1, {}, "expert_parallel_size: got 2, expected a divisor of the number of processes, 1"),
        (3, 3, {}, "expert_parallel_size: got 3, expected a divisor of the model's number of experts, 8"),
        (2, 2, {"tie_word_embeddings": True}, "expert_parallel_size: got 2, expected 1 with tied embeddings"),
    ],
)
def test_experts_that_cannot_be_split_are_refused(size, num_processes, change, message):
    config = DeepseekConfig.from_preset("debug", **{"tie_word_embeddings": False, **change})
    with pytest.raises(ValueError, match=message):
        check_expert_parallel(config, size, num_processes)


@pytest.mark.parametrize("stage", ["align", "grpo", "dpo"])
def test_fsdp_is_refused_where_it_was_not_tried(stage, monkeypatch):
    refuse_fsdp(stage)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=f"^engine: got FSDP, expected torchrun or DeepSpeed ZeRO-3 for {stage}"):
        refuse_fsdp(stage)


def test_an_adapter_of_a_rewarded_policy_is_not_split(monkeypatch):
    refuse_split_adapter(4, "align")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    refuse_split_adapter(0, "align")
    with pytest.raises(ValueError, match=r"^lora_rank: got 4, expected 0 for align under DeepSpeed"):
        refuse_split_adapter(4, "align")


def test_dpo_names_the_engines_that_agree_with_one_process(monkeypatch, tmp_path):
    recipe = DpoRecipe(model="m", data="pairs.jsonl", max_steps=1, learning_rate=0.1)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"^engine: got FSDP, expected torchrun or DeepSpeed ZeRO-3 for dpo"):
        dpo(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(FileNotFoundError, match=r"pairs\.jsonl"):
        dpo(recipe, tmp_path / "run")
