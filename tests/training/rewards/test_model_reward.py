"""A reward model by path: its scores are the model's own, one by one, and what has no head for one is refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from deepseek_training.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from deepseek_training.ppo.assembly import build_reward
from deepseek_training.recipes.align import AlignRecipe
from deepseek_training.rewards.model_reward import ModelReward
from modeling_deepseek import DeepseekConfig

PROMPTS = ["What is bread?", "How long does it keep, and where?"]
ANSWERS = ["Flour and water, baked.", "A week."]


@pytest.fixture(scope="module")
def save_classifier(tmp_path_factory):
    def save(template=None, num_labels=1, config=None):
        folder = tmp_path_factory.mktemp("classifier")
        tokenizer = train_tokenizer(PROMPTS + ANSWERS, 300)
        tokenizer.chat_template = template
        torch.manual_seed(0)
        config = config or DeepseekConfig.from_preset("debug", vocab_size=len(tokenizer))
        config.num_labels, config.pad_token_id = num_labels, tokenizer.pad_token_id
        model = AutoModelForSequenceClassification.from_config(config)
        torch.nn.init.normal_(model.score.weight)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE])
@pytest.mark.parametrize("config", [None, LlamaConfig(vocab_size=300, **LLAMA)], ids=["ours", "llama"])
def test_the_scores_are_the_models(save_classifier, template, config):
    path = save_classifier(template, config=config)
    reward = ModelReward(path)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path).eval(), reward.tokenizer
    alone = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        text = f"{prompt}\n{answer}" if template is None else f"<|begin|>User: {prompt}\n\nAssistant: {answer}<|end|>"
        with torch.no_grad():
            alone.append(model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits.item())
    assert reward(PROMPTS, ANSWERS) == pytest.approx(alone, abs=1e-5)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    said = [[{"role": "assistant", "content": answer}] for answer in ANSWERS]
    assert reward(chats, said) == pytest.approx(alone, abs=1e-5)
    weighted = build_reward(AlignRecipe(model="m", reward_model=path))
    assert weighted(prompts=PROMPTS, completions=ANSWERS) == pytest.approx(alone, abs=1e-5)


def test_what_is_too_long_loses_its_beginning(save_classifier):
    config = LlamaConfig(vocab_size=300, max_position_embeddings=8, **LLAMA)
    reward = ModelReward(save_classifier(config=config))
    assert reward(["x" * 40 + PROMPTS[0]], ANSWERS[:1]) == reward([PROMPTS[0]], ANSWERS[:1])


@pytest.mark.parametrize("kind", ["policy", "two labels"])
def test_a_model_without_a_head_for_one_score_is_refused(save_classifier, tmp_path, kind):
    path = save_classifier(num_labels=2)
    if kind == "policy":
        path = str(tmp_path)
        AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=300, **LLAMA)).save_pretrained(path)
    with pytest.raises(ValueError, match="expected a sequence classifier with one label"):
        ModelReward(path)


@pytest.mark.parametrize("other", [{"weights": [1.0, 0.0, 0.0]}, {"gate_threshold": 0.5}])
def test_it_is_not_mixed_with_settings_of_the_other_reward(other):
    with pytest.raises(ValueError, match="expected one of the two rewards"):
        AlignRecipe(model="m", reward_model="r", **other)


def test_a_tokenizer_without_pad_token(save_classifier):
    path = save_classifier()
    tokenizer = AutoTokenizer.from_pretrained(path)
    expected = ModelReward(path)(PROMPTS, ANSWERS)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(path)
    assert ModelReward(path)(PROMPTS, ANSWERS) == pytest.approx(expected, abs=1e-5)
