"""`mtp_loss_coef` of `adapt` and `sft`: prediction layers of our own and of stock models, trained and gone on with."""

import json
import shutil

import pytest
import torch
from mtp_checkpoints import write_glm, write_v3
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import TINY
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from deepseek_records.loading import load_model
from deepseek_training.data.texts import load_texts
from deepseek_training.data.tokenizer import train_tokenizer
from deepseek_training.mtp import mtp_loss, train_mtp
from deepseek_training.recipes.loading import build_recipe
from deepseek_training.recipes.pretrain_and_adapt import AdaptRecipe
from deepseek_training.recipes.sft import SftRecipe
from deepseek_training.stages.adapt import adapt
from deepseek_training.stages.sft import sft
from deepseek_training.trainer.checkpoints import load_weights
from modeling_deepseek.mtp import loss_over_depths

pytestmark = pytest.mark.skipif(
    not hasattr(MtpModel, "forward_layer"), reason="older transformers builds the layers for drafting alone"
)
SHORT = {"max_steps": 4, "learning_rate": 1e-2, "batch_size": 2, "sequence_length": 64, "logging_steps": 2}


def tensors_of(path):
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def layers_of(path, number):
    return {name: t for name, t in tensors_of(path).items() if f"layers.{number}." in name and "e_score" not in name}


def assert_trained(source, saved, number):
    before, after = layers_of(source, number), layers_of(saved, number)
    assert before and before.keys() == after.keys()
    assert not {name for name in before if torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def glm_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("glm")
    tokenizer = train_tokenizer(load_texts("dialogues", "validation"), 300)
    write_glm(path, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """Questions and answers in the form of the dialogues, and as texts."""
    path = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    sums = [(f"{i} and {j}?", f"{i + j}.") for i in range(12) for j in range(12)]
    rows = [{"prompt": ask, "answer": answer, "text": f"{ask} {answer} " * 8} for ask, answer in sums]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def copy_tokenizer(source, folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder)


def test_a_stock_model_is_tuned_and_goes_on_from_a_checkpoint(glm_path, sums, tmp_path, monkeypatch):
    settings = {
        **SHORT,
        "data": sums,
        "save_steps": 2,
        "num_eval_conversations": 2,
        "mtp_loss_coef": 0.3,
        "model": str(glm_path),
    }
    targets = []

    def noting(*args):
        targets.append(args[-1].labels)
        return loss_over_depths(*args)

    monkeypatch.setattr(mtp_loss, "loss_over_depths", noting)
    sft(build_recipe(settings, SftRecipe), tmp_path / "run")
    assert len(targets) >= 4  # the plan times a step besides
    assert all((labels == -100).any() and (labels != -100).any() for labels in targets[-4:])
    model = tmp_path / "run/model"
    assert_trained(glm_path, model, 2)
    assert {"model.layers.2.mlp.experts.3.up_proj.weight", "lm_head.weight"} <= tensors_of(model).keys()
    wanted = tensors_of(model)
    fresh = train_mtp(load_model(glm_path))
    load_weights(fresh, tmp_path / "run/checkpoints/checkpoint-4")
    fresh.save_pretrained(tmp_path / "again")
    found = tensors_of(tmp_path / "again")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert fresh.mtp_loss.coef == 0.3


def test_our_class_trains_those_of_a_deepseek_v3(glm_path, sums, tiny_data, tmp_path):
    write_v3(tmp_path / "v3", 1, vocab_size=300)
    copy_tokenizer(glm_path, tmp_path / "v3")
    settings = {
        **SHORT,
        "data": sums,
        "general_data": str(tiny_data),
        "eval_bytes": 1000,
        "model": str(tmp_path / "v3"),
    }
    adapt(build_recipe({**settings, "mtp_loss_coef": 0.3}, AdaptRecipe), tmp_path / "run")
    assert_trained(tmp_path / "v3", tmp_path / "run/model", 3)


def test_without_effect_it_is_refused(glm_path, sums, tmp_path):
    for coef in (0, -0.1, float("inf")):
        with pytest.raises(ValueError, match=r"^mtp_loss_coef: got .*, expected null or above 0"):
            build_recipe({**SHORT, "model": "m", "mtp_loss_coef": coef}, SftRecipe)
    for setting, value in (("lora_rank", 2), ("expert_parallel_size", 2)):
        with pytest.raises(ValueError, match=f"^mtp_loss_coef: got 0.3, expected null with {setting}=2"):
            build_recipe({**SHORT, "model": "m", "mtp_loss_coef": 0.3, setting: value}, AdaptRecipe)
    AutoModelForCausalLM.from_pretrained(glm_path).save_pretrained(tmp_path / "without")
    copy_tokenizer(glm_path, tmp_path / "without")
    settings = {**SHORT, "data": sums, "model": str(tmp_path / "without"), "mtp_loss_coef": 0.3}
    with pytest.raises(ValueError, match=r"^mtp: got .*without, expected a checkpoint with multi-token"):
        sft(build_recipe(settings, SftRecipe), tmp_path / "run")
    for depths, message in (
        (0, "num_nextn_predict_layers: got 0, expected 1 or more with mtp_loss_coef"),
        (1, "lacks"),
    ):
        path = tmp_path / f"v3-{depths}"
        config = DeepseekV3Config(**{**TINY, "vocab_size": 300, "num_nextn_predict_layers": depths})
        DeepseekV3ForCausalLM(config).save_pretrained(path)
        copy_tokenizer(glm_path, path)
        with pytest.raises(ValueError, match=message):
            sft(build_recipe({**settings, "model": str(path)}, SftRecipe), tmp_path / "run")
    base = load_model(glm_path)
    get_peft_model(base, LoraConfig(target_modules=["o_proj"])).save_pretrained(tmp_path / "adapter")
    copy_tokenizer(glm_path, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"^mtp_loss_coef: got 0.3 for an adapter, expected null, or a model made by"):
        sft(build_recipe({**settings, "model": str(tmp_path / "adapter")}, SftRecipe), tmp_path / "run")
