"""A speed of the balancing bias, which recipes set, meets a model of another family, whose routers have no bias."""

import json

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from deepseek_cli.main import main
from deepseek_records.loading import load_tokenizer

WIDTHS = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CLASSES = {
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"moe_intermediate_size": 16, "num_experts": 4, "head_dim": 16},
    ),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}),
}


@pytest.fixture(scope="module", params=["qwen3_moe", pytest.param("mixtral", marks=pytest.mark.slow)])
def without_bias(request, policy_path, tmp_path_factory):
    model_class, config_class, experts = CLASSES[request.param]
    tokenizer = load_tokenizer(policy_path)
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(tokenizer), num_key_value_heads=1, max_position_embeddings=256, **WIDTHS, **experts
    )
    path = tmp_path_factory.mktemp(request.param)
    model_class(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("is_dry", [False, True])
@pytest.mark.parametrize("stage", ["adapt", "sft", "dpo", "grpo"])
def test_a_speed_without_a_bias_is_refused_before_anything_is_written(without_bias, tmp_path, capsys, stage, is_dry):
    rows = [{"prompt": "Is 1 odd?", "chosen": "Yes.", "rejected": "No.", "split": split} for split in ("train",) * 8]
    rows += [{**row, "prompt": f"Is {i} odd?", "split": "validation"} for i, row in enumerate(rows)]
    (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "run"
    command = [stage, f"{stage}-debug", "--model", str(without_bias), "--output", str(output), "--report-to", "[]"]
    command += ["--bias-update-speed", "0.01", *(["--dry-run"] if is_dry else [])]
    if stage == "dpo":
        command += ["--data", str(tmp_path / "preferences.jsonl")]
    if stage == "grpo":
        command += ["--prompt-template", "null", "--max-prompt-tokens", "200"]
    assert main(command) == 2
    streams = capsys.readouterr()
    assert "bias_update_speed: got 0.01 for" in streams.err and "no balancing bias" in streams.err
    assert not output.exists() and "balancing bias 0.01" not in streams.out
