"""What `DeepseekForCausalLM.from_pretrained` promises holds by every way a command or a user loads a checkpoint."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config

from deepseek_eval.model_loading import load_model as load_to_score
from deepseek_records.loading import load_model
from deepseek_training.balance import ExpertBalanceCallback
from deepseek_training.data.texts import load_texts
from deepseek_training.data.tokenizer import train_tokenizer
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

WAYS = {
    "our class": DeepseekForCausalLM.from_pretrained,
    "Auto class": AutoModelForCausalLM.from_pretrained,
    "commands": load_model,
    "a run": lambda path: load_model(
        shutil.copytree(path, path.parent / f"run-{path.name}" / "model", dirs_exist_ok=True).parent
    ),
    "evaluation": lambda path: load_to_score(path).model,
}
FORMATS = ("ours", "official", "official fp8")
# Stock transformers loads the official formats itself there; the commands do not.
OURS_ONLY = {"Auto class"}
CASES = [(way, form) for way in WAYS for form in FORMATS if way not in OURS_ONLY or form == "ours"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One model with a prediction layer, in our format, as released, and as released in FP8."""
    root = tmp_path_factory.mktemp("formats")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "kv_lora_rank": 128, "qk_rope_head_dim": 64, "min_experts_per_tok": None}
    mtp = {"num_nextn_predict_layers": 1, "mtp_loss_coef": 0.3}
    tokenizer = train_tokenizer(load_texts("dialogues", "validation"), 300)
    config = DeepseekConfig.from_preset("debug", vocab_size=len(tokenizer), tie_word_embeddings=False, **sizes, **mtp)
    DeepseekForCausalLM(config).save_pretrained(root / "ours")
    tokenizer.save_pretrained(root / "ours")
    for name in ("official", "official fp8"):
        shutil.copytree(root / "ours", root / name, ignore=shutil.ignore_patterns("*.py"))
        known = set(DeepseekV3Config().to_dict()) | {"num_nextn_predict_layers"}
        settings = json.loads((root / name / "config.json").read_text())
        settings = {key: value for key, value in settings.items() if key in known}
        settings |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
        settings.pop("auto_map", None)
        if name.endswith("fp8"):
            blocks = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
            settings["quantization_config"] = {**blocks, "weight_block_size": [128, 128]}
            quantize(root / name / "model.safetensors")
        (root / name / "config.json").write_text(json.dumps(settings))
    return root


def quantize(path):
    """A projection of 192 rows, one block and a half, in FP8 with a scale per block."""
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("kv_a_proj_with_mqa.weight")]:
        weight = tensors[name]
        scales = torch.stack([block.abs().max().reshape(1) / 448 for block in weight.split(128)])
        tensors[name] = (weight / scales.repeat_interleave(128, 0)[: len(weight)]).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scales
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("way", "form"), CASES)
def test_the_weights_are_those_of_the_file(way, form, saved):
    wanted = DeepseekForCausalLM.from_pretrained(saved / "ours").state_dict()
    found = WAYS[way](saved / form).state_dict()
    assert wanted.keys() == found.keys()
    bound = 0.07 if form.endswith("fp8") else 0.0  # E4M3 keeps four bits
    for name, value in wanted.items():
        assert (found[name].float() - value).abs().max() <= bound * value.abs().max()


@pytest.mark.parametrize(("way", "form"), CASES)
def test_prediction_layers_are_kept_and_experts_saved_one_by_one(way, form, saved, tmp_path):
    WAYS[way](saved / form).save_pretrained(tmp_path)
    before, after = load_file(saved / "ours" / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert sum(".layers.3." in name for name in after) > 20
    assert any(name.endswith("mlp.experts.0.gate_proj.weight") for name in after)


@pytest.mark.parametrize(("way", "form"), CASES)
def test_balancing_is_off_until_asked_for(way, form, saved):
    model = WAYS[way](saved / form).train()
    for speed in (None, 0.01):
        callback = ExpertBalanceCallback(speed)
        callback.begin(model)
        model(input_ids=torch.arange(32).view(2, 16))
        callback.finish_step()
        callback.end(model)
        largest = model.model.layers[1].mlp.gate.e_score_correction_bias.abs().max()
        assert bool(largest > 0) is (speed is not None)


@pytest.mark.parametrize(("way", "form"), CASES)
@pytest.mark.parametrize("damage", ["cut", "missing", "scale"])
def test_damage_is_told_in_one_line(way, form, damage, saved, tmp_path):
    path = shutil.copytree(saved / form, tmp_path / "model")
    file = path / "model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "missing":
        tensors = load_file(file)
        del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
    elif form.endswith("fp8"):
        tensors = load_file(file)
        save_file({name: t for name, t in tensors.items() if not name.endswith("_scale_inv")}, file)
    else:
        return
    with pytest.raises((ValueError, OSError), match=r"cut short|lacks|holds its|scale|damaged") as caught:
        WAYS[way](path)
    assert "\n" not in str(caught.value)
