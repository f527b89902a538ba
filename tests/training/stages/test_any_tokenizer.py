"""Tokenizers without a begin, end or pad token, or with one token for two of them: a stage works or says so."""

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from deepseek_records.loading import load_model
from deepseek_training.data.texts import load_texts
from deepseek_training.data.tokenizer import train_tokenizer
from deepseek_training.recipes.loading import build_recipe, load_recipe
from deepseek_training.recipes.sft import SftRecipe
from deepseek_training.stages.adapt import AdaptRecipe, adapt
from deepseek_training.stages.align import AlignRecipe, align
from deepseek_training.stages.pretrain import PretrainRecipe, pretrain
from deepseek_training.stages.sft import sft
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

KINDS = {
    "pad is end": {"pad_token": "<|end|>"},
    "no begin": {"bos_token": None},
    "no pad": {"pad_token": None},
    "no end": {"eos_token": None},
    "no begin, pad is end": {"bos_token": None, "pad_token": "<|end|>"},
    "neither begin nor end": {"bos_token": None, "eos_token": None, "pad_token": None},
}
REFUSED = {("neither begin nor end", stage) for stage in ("pretrain", "adapt", "sft", "align")}
REFUSED |= {("no end", stage) for stage in ("pretrain", "adapt", "sft", "align")}
SMALL = {
    "max_steps": 2,
    "logging_steps": 1,
    "report_to": [],
    "batch_size": 2,
    "learning_rate": 1e-2,
    "sample_tokens": 2,
}


@pytest.fixture(scope="module", params=KINDS)
def base(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(load_texts("dialogues", "validation"), 300)
    for name, value in KINDS[request.param].items():
        setattr(tokenizer, name, value)
    torch.manual_seed(0)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    DeepseekForCausalLM(DeepseekConfig.from_preset("debug", vocab_size=len(tokenizer), **ids)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return request.param, path


def run_stage(stage, path, data, output):
    text = {**SMALL, "sequence_length": 32, "eval_bytes": 2000, "sample_prompts": ["The", ""]}
    if stage == "pretrain":
        recipe = {**text, "data": str(data), "tokenizer": str(path), "preset": "debug", "check_bigram": True}
        return pretrain(build_recipe(recipe, PretrainRecipe), output)
    if stage == "adapt":
        bars = {"min_domain_gain": -9.0, "max_general_loss": 9.0}
        recipe = {**text, **bars, "model": str(path), "data": str(data), "general_data": "dialogues"}
        return adapt(build_recipe(recipe, AdaptRecipe), output)
    if stage == "sft":
        own = {**SMALL, "model": str(path), "sequence_length": 256, "num_eval_conversations": 4}
        return sft(load_recipe("sft-debug", SftRecipe, own), output)
    own = {"model": str(path), "max_prompt_tokens": 400, "num_updates": 1, "batch_size": 4, "response_length": 4}
    return align(load_recipe("align-debug", AlignRecipe, own), output)


# The rest is slow: PPO and adaptation go through the same encoding.
@pytest.mark.parametrize(
    "stage", ["pretrain", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adapt", "sft", "align"))]
)
def test_a_stage_works_or_refuses_before_its_first_step(base, stage, tiny_data, tmp_path):
    kind, path = base
    if (kind, stage) not in REFUSED:
        summary = run_stage(stage, path, tiny_data, tmp_path / "run")
        assert summary.stage == stage and (tmp_path / "run" / "summary.json").is_file()
        return
    with pytest.raises(ValueError, match="tokenizer: ") as caught:
        run_stage(stage, path, tiny_data, tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(("pad", "end"), [(2, 2), (2, [3, 2]), (1, 5), (0, 2)])
@pytest.mark.parametrize("way", ["new", "ours", "stock"])
def test_the_end_token_is_learned_though_it_also_pads(pad, end, way, tmp_path):
    ids = {"pad_token_id": pad, "eos_token_id": end, "bos_token_id": 1}
    torch.manual_seed(0)
    if way == "stock":
        small = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": None, "kv_lora_rank": 16}
        widths = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4}
        more = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "num_hidden_layers": 1}
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**small, **heads, **widths, **more, **ids))
    else:
        model = DeepseekForCausalLM(DeepseekConfig.from_preset("debug", tie_word_embeddings=False, **ids))
    if way != "new":
        model.save_pretrained(tmp_path)
        model = load_model(tmp_path).train()
    before = model.get_input_embeddings().weight.detach().clone()
    ids = torch.arange(6).repeat(2, 2)
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = model.get_input_embeddings().weight.grad.norm(dim=-1)
    ends = {*(end if isinstance(end, list) else [end]), 1}
    assert all(gradients[token] > 0 for token in ends)
    assert (gradients[pad] > 0) == (pad in ends)
    assert way == "stock" or pad not in ends or before[pad].norm() > 0
