"""Cards of other families, adapters and folders without a run; all that they print is run."""

import pytest
import torch
import yaml
from printed_commands import run_all_that_it_prints
from transformers import AutoModelForCausalLM

from deepseek_cli.main import main
from deepseek_model_cards.card.card import write_card
from deepseek_records.run_folder import RunFolder
from deepseek_records.summary import Summary

SIZES = {
    **{"vocab_size": 300, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "head_dim": 16},
}
DEEPSEEK = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1},
    **{"first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": None, "head_dim": 8, "qk_rope_head_dim": 8},
    **{"qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 2},
}
FAMILIES = {
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "llama": {},
    "gpt_neox": {},  # of another vocabulary of settings and tensor names
    "deepseek_v3": DEEPSEEK,
    "deepseek_moe": {**DEEPSEEK, "min_experts_per_tok": 2, "scoring_func": "sigmoid"},
}
NEVER = ("reward", "PPO", "aligned", "apache", "deepseek_v3 --", "MLA", "DeepSeek", "latent", "sigmoid")


def save(family: str, path):
    """A tiny checkpoint of a family, with a tokenizer."""
    from transformers import AutoConfig

    import modeling_deepseek  # noqa: F401  (registers ours)
    from deepseek_training.data.tokenizer import train_tokenizer

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(path)
    train_tokenizer(["a fox and a crow sat on a wall"] * 4, 300).save_pretrained(path)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_foreign_folder_is_described_by_its_own_files(family, tmp_path):
    model = save(family, tmp_path / "fox")
    readme = write_card(tmp_path / "fox")
    text = readme.read_text()
    ran = run_all_that_it_prints(readme)
    is_ours, is_deepseek = family == "deepseek_moe", family.startswith("deepseek")
    assert len(ran) == (3 if is_ours else 1) and ("import modeling_deepseek" in ran[0]) == is_ours
    assert f"**{sum(p.numel() for p in model.parameters()):,}**" in text and "| other |" not in text
    assert ("active per token" in text) == (family not in ("llama", "gpt_neox"))
    assert ("mixture-of-experts" in text) == (family not in ("llama", "gpt_neox"))
    assert "Not recorded: no run lies in this folder." in text and "License: not stated." in text
    if not is_deepseek:
        assert [word for word in NEVER if word in text.replace("written by deepseek-moe", "")] == []
    assert (tmp_path / "fox" / "block.png").exists() == is_deepseek


def test_the_active_parameters_are_those_of_the_experts_that_a_token_meets(tmp_path):
    for family, experts, active in (("qwen3_moe", 6, 2), ("mixtral", 5, 2)):
        model = save(family, tmp_path / family)
        routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        total = sum(p.numel() for p in model.parameters())
        text = write_card(tmp_path / family).read_text()
        assert f"| **active per token** | **{round(total - routed * (1 - active / experts)):,}** |" in text
        assert f"{experts} routed experts; {active} work on each token" in text


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "llama"])
def test_a_fine_tuned_model_names_its_base_and_takes_over_its_license(family, tmp_path):
    base = tmp_path / "base"
    save(family, base)
    (base / "README.md").write_text("---\nlicense: gemma\n---\n")
    run = RunFolder.create(tmp_path / "tuned", {"model": str(base)}, command="sft", seed=0)
    save(family, run.model_path)
    run.finish(Summary(stage="sft", base_model=str(base)))
    readme = write_card(run.path)
    text = readme.read_text()
    assert "license: gemma" in text and "License: gemma, that of the base model `base`." in text
    assert "It starts from the local folder `base`. It was fine-tuned to answer." in text
    assert str(tmp_path) not in text and "base_model:" not in text and run_all_that_it_prints(readme)


def test_a_hub_id_is_a_base_model_in_the_metadata(tmp_path):
    run = RunFolder.create(tmp_path / "tuned", {"model": "org/small"}, command="sft", seed=0)
    save("llama", run.model_path)
    run.finish(Summary(stage="sft", base_model="org/small"))
    metadata = yaml.safe_load(write_card(run.path).read_text().split("---")[1])
    assert metadata["base_model"] == ["org/small"] and metadata["base_model_relation"] == "finetune"
    assert "license" not in metadata


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_moe"])
def test_an_adapter_is_described_as_one_and_loads_as_printed(family, tmp_path):
    from peft import LoraConfig, get_peft_model

    save(family, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules=["o_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    assert "[More Information Needed]" in (tmp_path / "adapter" / "README.md").read_text()  # PEFT's own, untouched
    readme = write_card(tmp_path / "adapter", license="mit")
    text = readme.read_text()
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert "An adapter (LORA of rank 3) for a language model" in text and f"**{trained:,}**" in text
    assert "library_name: peft" in text and "../base" in text and str(tmp_path) not in text
    assert run_all_that_it_prints(readme)


def test_packed_weights_are_not_counted_and_that_is_said(tmp_path):
    from safetensors.torch import save_file

    save("llama", tmp_path / "fox")
    save_file(
        {"model.layers.0.mlp.up_proj.weight": torch.zeros(4, 4, dtype=torch.uint8)}, tmp_path / "fox" / "b.safetensors"
    )
    text = write_card(tmp_path / "fox").read_text()
    assert "Its parameters were not counted" in text and "parameters, of which" not in text


def test_a_card_with_somebodys_edits_is_never_written_over(tmp_path, capsys):
    save("llama", tmp_path / "fox")
    readme = tmp_path / "fox" / "README.md"
    readme.write_text("# The card of its authors\n")
    assert main(["card", str(readme.parent)]) == 2 and "holds edits" in capsys.readouterr().err
    assert readme.read_text() == "# The card of its authors\n"
    assert main(["card", str(readme.parent), "--output", str(tmp_path / "out")]) == 0
    ours = tmp_path / "out" / "README.md"
    assert main(["card", str(readme.parent), "--output", str(tmp_path / "out"), "--license", "mit"]) == 0
    ours.write_text(ours.read_text().replace("# fox", "# My fox"))
    edited = ours.read_text()
    assert main(["card", str(readme.parent), "--output", str(tmp_path / "out")]) == 2
    assert ours.read_text() == edited and edited.count("# My fox") == 1


def test_a_folder_of_several_models_is_one_line(tmp_path, capsys):
    for name in ("one", "two", "three"):
        run = RunFolder.create(tmp_path / name, {"model": "org/small"}, command="sft", seed=0)
        run.finish(Summary(stage="sft", base_model="org/small"))
        run.model_path.mkdir()
        (run.model_path / "config.json").write_text("{}")
    assert main(["card", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "expected one model; pass one of them" in error
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_a_trainer_of_any_family_gets_a_card_that_is_true(family, tmp_path):
    from torch.utils.data import Dataset
    from transformers import AutoTokenizer, Trainer, TrainingArguments

    from deepseek_model_cards.hub_callback import HubCardCallback

    class Rows(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return {"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i}

    save(family, tmp_path / "base")
    options = {"use_cpu": True, "report_to": [], "max_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        TrainingArguments(str(tmp_path / "out"), **options),
        train_dataset=Rows(),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "base"),
    )
    trainer.add_callback(HubCardCallback(trainer, license="mit"))
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    text = (tmp_path / "out" / "README.md").read_text()
    assert "It was trained with transformers' Trainer." in text and "local folder `base`" in text
    assert [word for word in NEVER if word in text.replace("written by deepseek-moe", "")] == []
    assert run_all_that_it_prints(tmp_path / "out" / "README.md")
