import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_model_cards.card.parameter_table import count_checkpoint, part_of
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

CASES = {
    "sigmoid": {},
    "softmax, dynamic": {"scoring_func": "softmax", "num_experts_per_tok": 4, "min_experts_per_tok": 2},
    "expert keys": {"router_key_dim": 8},
    "layernorm, untied": {"norm_type": "layernorm", "tie_word_embeddings": False},
    "query latent": {"q_lora_rank": 16},
}


@pytest.mark.parametrize("case", CASES)
def test_counts_equal_the_models_own_parameters(case, tmp_path):
    """Witness: the live module's parameters, routed experts scaled to those a token meets."""
    config = DeepseekConfig.from_preset("debug", **CASES[case])
    model = DeepseekForCausalLM(config)
    model.save_pretrained(tmp_path)
    table = count_checkpoint(tmp_path)
    routed = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    total = sum(p.numel() for p in model.parameters())
    assert table.total == total == sum(table.by_part.values())
    assert table.by_part["routed experts"] == routed
    assert table.active == total - routed + routed * config.num_experts_per_tok // config.n_routed_experts
    assert "other" not in table.by_part


def test_shards_and_types_count_like_one_file(tmp_path):
    model = DeepseekForCausalLM(DeepseekConfig.from_preset("debug")).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = count_checkpoint(tmp_path / "one"), count_checkpoint(tmp_path / "many")
    assert one == many and one.dtypes[0] == "BF16"


def test_a_cut_checkpoint_is_refused(finished_run, tmp_path):
    shutil.copy(finished_run / "align" / "model" / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="safetensors"):
        count_checkpoint(tmp_path)
    whole = (finished_run / "align" / "model" / "model.safetensors").read_bytes()
    for size in (3, 100):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut short"):
            count_checkpoint(tmp_path)


def test_every_name_of_a_saved_model_has_a_part(finished_run):
    model = AutoModelForCausalLM.from_pretrained(finished_run / "align" / "model")
    assert {part_of(name) for name, _ in model.named_parameters()} == {
        *("embedding", "attention", "routed experts", "shared experts", "router", "dense feed-forward", "norm"),
    }
