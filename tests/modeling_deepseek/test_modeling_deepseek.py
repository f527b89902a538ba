import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
)

from deepseek_records.activation_checkpointing import enable_checkpointing
from modeling_deepseek import (
    DeepseekConfig,
    DeepseekForCausalLM,
    DeepseekForSequenceClassification,
    DeepseekModel,
)

EXTENDED = {
    "softmax": {"scoring_func": "softmax", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
    "dynamic": {"min_experts_per_tok": 1, "target_experts_per_tok": 1.7},
    "expert keys": {"router_key_dim": 6},
    "layernorm and dropout": {"norm_type": "layernorm", "hidden_dropout": 0.1},
    "all": {
        "scoring_func": "softmax",
        "min_experts_per_tok": 1,
        "router_key_dim": 6,
        "norm_type": "layernorm",
        "hidden_dropout": 0.1,
        "tie_word_embeddings": True,
        "q_lora_rank": None,
    },
}


@pytest.fixture
def pair(stock, tmp_path):
    """transformers' model, and ours loaded from what it saved."""
    stock.save_pretrained(tmp_path)
    return stock, DeepseekForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_logits_and_gradients_equal_transformers(pair, input_ids, implementation):
    gradients = []
    for model in pair:
        model.set_experts_implementation(implementation)
        output = model.train()(input_ids, labels=input_ids)
        output.loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        gradients[-1]["logits"] = output.logits
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert expected is not None and torch.equal(gradients[1][name], expected), name


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_text_equals_transformers(pair, input_ids, use_cache):
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), input_ids], dim=1)
    mask = (padded != 0).long()
    texts = [
        model.generate(padded, attention_mask=mask, max_new_tokens=24, do_sample=False, use_cache=use_cache)
        for model in pair
    ]
    assert torch.equal(*texts) and texts[0].shape[1] > 20


def test_bf16_equals_transformers(pair, input_ids, tmp_path):
    expected = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)(input_ids).logits
    assert torch.equal(DeepseekForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)(input_ids).logits, expected)


def test_classifier_equals_transformers(tiny, stock, input_ids, tmp_path):
    torch.manual_seed(0)
    classifier = DeepseekV3ForSequenceClassification(stock.config).eval()
    classifier.save_pretrained(tmp_path)
    ours = DeepseekForSequenceClassification.from_pretrained(tmp_path)
    padded = torch.cat([input_ids, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    assert torch.equal(ours(padded).logits, classifier(padded).logits)


def test_router_logits_and_hidden_states_are_reported(pair, input_ids):
    stock, ours = (model(input_ids, output_router_logits=True, output_hidden_states=True) for model in pair)
    if not hasattr(stock, "router_logits"):
        pytest.skip("this transformers (5.17) reports no router logits for DeepSeek-V3 either")
    assert len(ours.router_logits) == len(stock.router_logits) == 2
    for one, other in zip(
        ours.router_logits + ours.hidden_states, stock.router_logits + stock.hidden_states, strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", EXTENDED)
def test_extended_models_train_and_decode(tiny, input_ids, name):
    """The loss falls on one batch, every parameter gets a gradient, and cached decoding equals uncached."""
    torch.manual_seed(0)
    model = DeepseekForCausalLM(DeepseekConfig(**{**tiny, **EXTENDED[name]}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        missing = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        # A batch of 26 tokens may leave an expert out, but not all experts of a layer.
        assert not missing
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    for implementation in ("eager", "grouped_mm", "batched_mm", "fused_moe"):
        model.set_experts_implementation(implementation)
        cached = model.generate(input_ids, max_new_tokens=12, do_sample=False, use_cache=True)
        assert torch.equal(cached, model.generate(input_ids, max_new_tokens=12, do_sample=False, use_cache=False))


@pytest.mark.parametrize("name", EXTENDED)
def test_experts_implementations_agree(tiny, input_ids, name):
    torch.manual_seed(0)
    model = DeepseekForCausalLM(DeepseekConfig(**{**tiny, **EXTENDED[name]})).eval()
    logits = {}
    for implementation in ("eager", "grouped_mm", "batched_mm", "fused_moe"):
        model.set_experts_implementation(implementation)
        logits[implementation] = model(input_ids).logits
        assert logits[implementation].isfinite().all()
        torch.testing.assert_close(logits[implementation], logits["eager"], rtol=1e-4, atol=1e-5)


def test_norms_and_dropout_are_where_they_should_be(tiny):
    article = DeepseekModel(DeepseekConfig(**tiny, norm_type="layernorm", hidden_dropout=0.1))
    kinds = [type(module).__name__ for module in article.modules()]
    # Two a layer, two latents a layer, one at the end; one dropout module a layer serves both branches.
    assert kinds.count("LayerNorm") == 13 and kinds.count("DeepseekV3RMSNorm") == 0 and kinds.count("Dropout") == 3
    plain = [type(module).__name__ for module in DeepseekModel(DeepseekConfig(**tiny)).modules()]
    assert plain.count("DeepseekV3RMSNorm") == 13 and plain.count("Dropout") == 0


def test_dropout_acts_in_training_only(tiny, input_ids):
    model = DeepseekForCausalLM(DeepseekConfig(**tiny, hidden_dropout=0.1))
    assert not torch.equal(model.train()(input_ids).logits, model(input_ids).logits)
    assert torch.equal(model.eval()(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["dynamic", "all"])
def test_activation_checkpointing_leaves_gradients_alone(tiny, input_ids, name, reentrant):
    gradients = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        model = DeepseekForCausalLM(DeepseekConfig(**{**tiny, **EXTENDED[name], "hidden_dropout": 0.0}))
        if is_checkpointed:
            enable_checkpointing(model, {"use_reentrant": reentrant})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):  # Beyond the first step p moves between passes.
            optimizer.zero_grad()
            model(input_ids, labels=input_ids).loss.backward()
            optimizer.step()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, rtol=1e-5, atol=1e-7, msg=key)


def test_causality_and_padding(tiny, input_ids):
    model = DeepseekForCausalLM(DeepseekConfig(**{**tiny, **EXTENDED["dynamic"]})).eval()
    logits = model(input_ids).logits
    changed = input_ids.clone()
    changed[:, 8:] = 5
    torch.testing.assert_close(model(changed).logits[:, :8], logits[:, :8])
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), input_ids], dim=1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    shifted = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    torch.testing.assert_close(shifted, logits, rtol=1e-4, atol=1e-5)


def test_auto_classes_know_the_model(tiny):
    config = DeepseekConfig(**tiny)
    assert type(AutoModel.from_config(config)) is DeepseekModel
    assert type(AutoModelForCausalLM.from_config(config)) is DeepseekForCausalLM
    assert type(AutoModelForSequenceClassification.from_config(config)) is DeepseekForSequenceClassification


def test_small_presets_start_near_uniform_and_with_balanced_activations():
    for name in ("nano", "debug"):
        torch.manual_seed(0)
        config = DeepseekConfig.from_preset(name)
        model = DeepseekForCausalLM(config)
        input_ids = torch.randint(3, config.vocab_size, (2, 64))
        with torch.no_grad():
            loss = model(input_ids, labels=input_ids).loss.item()
        assert abs(loss - torch.log(torch.tensor(config.vocab_size)).item()) < 0.3
        assert not any(isinstance(module, nn.Dropout) for module in model.modules())
