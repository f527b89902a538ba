"""`export --to expert_lora`: the names of each family's own checkpoint, back again, and bad input in one line."""

import argparse
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from saved_families import FAMILIES, logits, save_base
from transformers import AutoModelForCausalLM, GptOssConfig

from deepseek_cli import export
from deepseek_cli.main import main
from deepseek_serving.checkpoint_names import read_names
from deepseek_serving.expert_adapter import CONFIG, WEIGHTS, join_experts
from deepseek_serving.expert_lora import build_without_weights, export_expert_lora

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def save_adapter(base, path, **settings):
    """An adapter whose factors are all drawn, on attention, experts and, saved whole, the routers."""
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 2, "target_modules": ["o_proj"], "target_parameters": EXPERTS, **settings}
    model = get_peft_model(model, LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.manual_seed(len(name))
            parameter.data.normal_(std=0.3)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_base(request.param, folder / "base")
    save_adapter(folder / "base", folder / "adapter", modules_to_save=["gate"])
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    save_base("mixtral", folder / "base")
    save_adapter(folder / "base", folder / "adapter")
    return folder


def run(*words) -> int:
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    return export.run(parser.parse_args([str(word) for word in words]))


def test_each_family_gets_its_own_names_and_comes_back_bit_for_bit(family, tmp_path):
    single = export_expert_lora(family / "adapter", tmp_path / "single")
    names = {key.removesuffix(".weight") for key in load_file(family / "base/model.safetensors")}
    adapted = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in load_file(single / WEIGHTS)}
    assert {name.removesuffix(".weight") for name in adapted} <= names
    model = build_without_weights(str(family / "base"))
    joined = join_experts(single, tmp_path / "joined", read_names(model))
    before, after = load_file(family / "adapter" / WEIGHTS), load_file(joined / WEIGHTS)
    assert before.keys() == after.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_mixtral_by_its_letters_and_peft_computes_the_same(mixtral, tmp_path, capsys):
    assert run(mixtral / "adapter", tmp_path / "single", "--to", "expert_lora") == 0
    assert "expert adapter" in capsys.readouterr().out
    keys = load_file(tmp_path / "single" / WEIGHTS)
    assert "base_model.model.model.layers.1.block_sparse_moe.experts.3.w2.lora_A.weight" in keys
    assert json.loads((tmp_path / "single" / CONFIG).read_text())["target_modules"] == ["o_proj", "w1", "w2", "w3"]
    models = [AutoModelForCausalLM.from_pretrained(mixtral / "base", dtype=torch.float32) for _ in range(2)]
    fused, single = (
        PeftModel.from_pretrained(model, folder)
        for model, folder in zip(models, (mixtral / "adapter", tmp_path / "single"), strict=True)
    )
    torch.testing.assert_close(logits(single), logits(fused), rtol=1e-4, atol=1e-4)


def test_a_base_that_has_moved_is_named(mixtral, tmp_path):
    (mixtral / "base").rename(tmp_path / "elsewhere")
    try:
        with pytest.raises(FileNotFoundError, match=r"of the base model .* which does not exist"):
            export_expert_lora(mixtral / "adapter", tmp_path / "no")
        assert run(mixtral / "adapter", tmp_path / "out", "--to", "expert_lora", "--base", tmp_path / "elsewhere") == 0
    finally:
        (tmp_path / "elsewhere").rename(mixtral / "base")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "elsewhere")


def test_bad_input_is_one_line_and_writes_nothing(mixtral, tmp_path):
    no = tmp_path / "no"
    with pytest.raises(FileNotFoundError, match=r"expected a folder with adapter_config\.json and no model"):
        export_expert_lora(mixtral / "base", no)
    save_base("qwen3_moe", tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"adapter: got \(96, 8\) for .*'s B, expected \(48, 8\) .*; the adapter names"
    ):
        export_expert_lora(mixtral / "adapter", no, str(tmp_path / "other"))
    with pytest.raises(FileExistsError, match="expected an empty or absent folder"):
        export_expert_lora(mixtral / "adapter", mixtral / "base")
    with pytest.raises(ValueError, match="--base: goes with --to expert_lora only"):
        run(mixtral / "base", no, "--base", "x")
    save_adapter(mixtral / "base", tmp_path / "one", target_parameters=EXPERTS[:1])
    with pytest.raises(ValueError, match="expected A and B of both projections"):
        export_expert_lora(tmp_path / "one", no)
    config = json.loads((tmp_path / "one" / CONFIG).read_text())
    (tmp_path / "one" / CONFIG).write_text(json.dumps({**config, "r": 0}))
    with pytest.raises(ValueError, match="r: got 0, expected a rank of at least 1"):
        export_expert_lora(tmp_path / "one", no)
    (tmp_path / "one" / CONFIG).write_text(json.dumps({**config, "r": 3}))
    with pytest.raises(ValueError, match="at rank 3 for"):
        export_expert_lora(tmp_path / "one", no)
    (tmp_path / "one" / WEIGHTS).write_bytes(b"half")
    with pytest.raises(ValueError, match="damaged or cut short"):
        export_expert_lora(tmp_path / "one", no)
    assert not no.exists()


def test_the_command_tells_it_in_one_line(mixtral, tmp_path, capsys):
    words = ["export", str(mixtral / "base"), str(tmp_path / "no"), "--to", "expert_lora"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("deepseek-moe export: error: adapter: got ")


def test_a_family_that_stores_experts_fused_is_refused():
    config = GptOssConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_local_experts=4, head_dim=8)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="got gpt_oss, whose checkpoints do not hold gate, up and down"):
        read_names(model)
