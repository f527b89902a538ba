import json

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from deepseek_records.run_folder import RunFolder
from deepseek_training.data.tokenizer import train_tokenizer
from deepseek_training.recipes.loading import build_recipe
from deepseek_training.stages.adapt import AdaptRecipe, adapt
from deepseek_training.stages.pretrain import PretrainRecipe, pretrain


@pytest.fixture(scope="module")
def domain(tmp_path_factory):
    """A domain that is easy to learn and unlike the tales: forty lists of doses."""
    path = tmp_path_factory.mktemp("domain") / "doses.jsonl"
    rows = [{"text": "\n".join(f"dose {j}: {(i * 7 + j) % 10} mg" for j in range(12))} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def settings(tiny_settings, tiny_data, domain):
    kept = ("sequence_length", "batch_size", "logging_steps", "save_steps", "eval_bytes", "sample_prompts")
    return {
        **{key: tiny_settings[key] for key in kept},
        "data": str(domain),
        "general_data": str(tiny_data),
        "replay_share": 0.5,
        "max_steps": 20,
        "learning_rate": 3e-3,
        "eval_steps": 0,
        "sample_tokens": 5,
    }


def test_the_domain_is_learned_and_both_sets_are_reported(tiny_settings, settings, tmp_path):
    pretrain(build_recipe(tiny_settings, PretrainRecipe), tmp_path / "base")
    recipe = build_recipe({**settings, "model": str(tmp_path / "base" / "model")}, AdaptRecipe)
    summary = adapt(recipe, tmp_path / "run")
    values = {(row.dataset, row.when): row.value for row in summary.results}
    assert values["doses", "after"] < 0.8 * values["doses", "before"]
    domain_check, general_check = summary.checks
    assert domain_check.passed and domain_check.comparison == "<="
    assert domain_check.value == pytest.approx(values["doses", "after"] / values["doses", "before"] - 1)
    assert general_check.value == pytest.approx(values["tales", "after"] / values["tales", "before"] - 1)
    assert general_check.dataset == "tales" and general_check.bound == 0.04
    rows = [row for row in RunFolder(tmp_path / "run").metrics if "eval_doses_bits_per_byte" in row]
    assert [row["step"] for row in rows] == [0, 20]
    assert rows[0]["eval_tales_bits_per_byte"] == values["tales", "before"]


def test_a_model_that_is_not_ours_is_adapted(settings, tmp_path):
    """Stock DeepSeek-V3 with its own defaults in every setting of ours."""
    tokenizer = train_tokenizer(["dose of a tale"] * 3, 270)
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": None, "kv_lora_rank": 16}
    widths = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4}
    routing = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    config = DeepseekV3Config(vocab_size=len(tokenizer), **small, **heads, **widths, **routing)
    DeepseekV3ForCausalLM(config).save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    change = {"model": str(tmp_path / "theirs"), "max_steps": 4, "experts_implementation": "eager"}
    summary = adapt(build_recipe({**settings, **change}, AdaptRecipe), tmp_path / "run")
    (load,) = summary.tokens_per_expert  # one MoE layer: 2 of 4 experts per token, two steps of 4 x 32 tokens
    assert sum(load) == 2 * 2 * 4 * 32
    DeepseekV3ForCausalLM.from_pretrained(tmp_path / "run" / "model")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "no/such/folder"}, (ValueError, FileNotFoundError), "no/such/folder"),
        ({"replay_share": 1.0}, ValueError, "replay_share: got 1.0, expected in [0, 1)"),
        ({"data": "books", "general_data": "books"}, ValueError, "expected another data set"),
    ],
)
def test_bad_settings_fail_in_one_line(settings, tmp_path, change, error, message):
    with pytest.raises(error) as caught:
        adapt(build_recipe({"model": "x", **settings, **change}, AdaptRecipe), tmp_path / "run")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
