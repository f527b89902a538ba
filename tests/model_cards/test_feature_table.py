"""The features of transformers tried on our model, and the table of them in the docs.

Each row is a function that uses the feature and returns what came of it; a test holds that against the row, and
another holds the rows against ``docs/sharing_and_serving.md``. ``UPDATE_DOCS=1 pytest -k feature_table`` rewrites it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    pipeline,
)

from deepseek_records.activation_checkpointing import enable_checkpointing
from deepseek_training.data.tokenizer import train_tokenizer
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

DOCS = Path(__file__).parents[2] / "docs" / "sharing_and_serving.md"
BEGIN, END = "<!-- begin: features, written by tests/model_cards/test_feature_table.py -->", "<!-- end: features -->"
EQUAL = "works, equal logits"
SAME_TEXT = "works, same text"


@dataclass(frozen=True)
class Case:
    """A saved model with what it computes when loaded plainly."""

    path: Path
    model: DeepseekForCausalLM
    tokenizer: object
    ids: torch.Tensor
    logits: torch.Tensor

    def load(self, **options):
        return AutoModelForCausalLM.from_pretrained(self.path, **options).eval()

    def compare(self, model, **inputs) -> str:
        """EQUAL, or how far the logits are; fp32 in another order of operations stays below 1e-4."""
        with torch.no_grad():
            logits = model(**(inputs or {"input_ids": self.ids})).logits
        difference = float((logits - self.logits).abs().max())
        return EQUAL if difference < 1e-4 else f"logits differ by {difference:.2g}"

    def generate(self, **options) -> list[int]:
        settings = {"max_new_tokens": 8, "do_sample": False, **options}
        return self.model.generate(self.ids, **settings)[0].tolist()

    def same_text(self, **options) -> str:
        return SAME_TEXT if self.generate(**options) == self.generate() else "other text"


def use_pipeline(case: Case) -> str:
    written = pipeline("text-generation", model=str(case.path), trust_remote_code=True)(
        "a fox sat on", max_new_tokens=8, do_sample=False, return_full_text=False
    )
    expected = case.tokenizer.decode(case.generate()[case.ids.shape[1] :], skip_special_tokens=True)
    return SAME_TEXT if written[0]["generated_text"] == expected else "other text"


def use_auto_model(case: Case) -> str:
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(case.path).eval()(case.ids).last_hidden_state
        logits = case.model.lm_head(hidden)
    return EQUAL if torch.allclose(logits, case.logits, atol=1e-4) else "other hidden states"


def use_classifier(case: Case) -> str:
    model = AutoModelForSequenceClassification.from_pretrained(case.path, num_labels=3)
    loss = model(case.ids, labels=torch.tensor([1])).loss
    loss.backward()
    return "works, trains" if model.score.weight.grad.abs().sum() > 0 else "no gradient"


def use_dtype_auto(case: Case) -> str:
    folder = case.path.parent / "bf16"
    if not folder.exists():
        case.load(dtype=torch.bfloat16).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    kept = model.dtype == torch.bfloat16
    biases = [b.dtype for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    return "works, balancing bias stays fp32" if kept and set(biases) == {torch.float32} else "another type"


def use_generation_config(case: Case) -> str:
    folder = case.path.parent / "configured"
    if not folder.exists():
        model = case.load()
        model.generation_config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=2, pad_token_id=0)
        model.save_pretrained(folder)
    written = AutoModelForCausalLM.from_pretrained(folder).generate(case.ids)
    return "works, saved settings apply" if written.shape[1] == case.ids.shape[1] + 3 else "settings lost"


def use_left_padding(case: Case) -> str:
    texts = ["a fox sat on", "a crow and a fox sat on a wall"]
    batch = case.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    written = case.model.generate(**batch, max_new_tokens=8, do_sample=False)
    alone = case.generate()[case.ids.shape[1] :]
    return SAME_TEXT if written[0, batch.input_ids.shape[1] :].tolist() == alone else "other text"


def use_checkpointing(case: Case) -> str:
    def gradients(model):
        model(case.ids, labels=case.ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients(case.load().train())
    model = case.load().train()
    enable_checkpointing(model)
    again = gradients(model)
    return (
        "works, equal gradients" if all(torch.equal(plain[name], again[name]) for name in plain) else "other gradients"
    )


def use_extra_outputs(case: Case) -> str:
    options = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    out = case.load(attn_implementation="eager")(case.ids, **options)
    layers, moe = case.model.config.num_hidden_layers, case.model.config.first_k_dense_replace
    counts = (len(out.hidden_states), len(out.attentions), len(out.router_logits))
    return "works" if counts == (layers + 1, layers, layers - moe) else f"{counts}"


def use_resize(case: Case) -> str:
    model = case.load()
    model.resize_token_embeddings(310)
    with torch.no_grad():
        logits = model(case.ids).logits
    same = logits.shape[-1] == 310 and torch.allclose(logits[..., :300], case.logits, atol=1e-5)
    return "works, old logits kept" if same else "other logits"


def use_lora(case: Case) -> str:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(case.load(), LoraConfig(target_modules=["q_proj", "kv_b_proj", "o_proj"]))
    model(case.ids, labels=case.ids).loss.backward()
    return (
        "works, trains" if any(p.grad is not None for n, p in model.named_parameters() if "lora" in n) else "no grad"
    )


def use_lora_on_experts(case: Case) -> str:
    from peft import LoraConfig, get_peft_model

    names = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(case.load(), LoraConfig(target_parameters=names, target_modules=[], lora_dropout=0.0))
    model(case.ids, labels=case.ids).loss.backward()
    return (
        "works, trains" if any(p.grad is not None for n, p in model.named_parameters() if "lora" in n) else "no grad"
    )


def use_compile(case: Case) -> str:
    torch._dynamo.reset()
    return case.compare(torch.compile(case.load()))


def use_flash_attention(case: Case) -> str:
    try:
        case.load(attn_implementation="flash_attention_2")
    except ImportError:
        return "not run: needs a GPU and the package flash-attn"
    return "loads"


def use_offloaded_cache(case: Case) -> str:
    try:
        case.generate(cache_implementation="offloaded")
    except AssertionError as error:
        assert "CUDA" in str(error)
        return "not run: needs a GPU"
    return SAME_TEXT


def use_continuous_batching(case: Case) -> str:
    """Fails, and for the same reason in transformers' own DeepSeek-V3: that is checked too, or the row must change."""
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=2, pad_token_id=0)
    stock = DeepseekV3Config().to_dict().keys() - {"model_type", "architectures", "transformers_version", "dtype"}
    shared = {key: value for key, value in case.model.config.to_dict().items() if key in stock}
    errors = []
    for model in (case.load(), DeepseekV3ForCausalLM(DeepseekV3Config(**shared)).eval()):
        done = model.generate_batch(inputs=[case.ids[0].tolist()], generation_config=settings)
        errors += [str(answer.error) for answer in done.values()]
    assert len(set(errors)) == 1
    if "same slice shapes" in errors[0]:
        return "fails in transformers, its own DeepSeek-V3 alike: paged keys sized by `head_dim`, MLA's rotary part"
    return "works"


@dataclass(frozen=True)
class Feature:
    """A row: what was tried, how it is asked for, what came of it, whether it takes long."""

    name: str
    code: str
    use: Callable[[Case], str]
    result: str
    is_slow: bool = False


def with_attention(name: str) -> Callable[[Case], str]:
    return lambda case: case.compare(case.load(attn_implementation=name))


def with_experts(name: str) -> Callable[[Case], str]:
    return lambda case: case.compare(case.load(experts_implementation=name))


FEATURES = (
    Feature("pipeline", 'pipeline("text-generation", model=path, trust_remote_code=True)', use_pipeline, SAME_TEXT),
    Feature("AutoModel", "AutoModel.from_pretrained(path)", use_auto_model, EQUAL),
    Feature("classification", "AutoModelForSequenceClassification.from_pretrained", use_classifier, "works, trains"),
    Feature("device map", 'device_map="auto"', lambda c: c.compare(c.load(device_map="auto")), EQUAL),
    Feature("dtype", 'dtype="auto"', use_dtype_auto, "works, balancing bias stays fp32"),
    Feature("low memory", "low_cpu_mem_usage=True", lambda c: c.compare(c.load(low_cpu_mem_usage=True)), EQUAL),
    Feature("eager attention", 'attn_implementation="eager"', with_attention("eager"), EQUAL),
    Feature("SDPA", 'attn_implementation="sdpa"', with_attention("sdpa"), EQUAL),
    Feature("flex attention", 'attn_implementation="flex_attention"', with_attention("flex_attention"), EQUAL, True),
    Feature(
        "flash attention",
        'attn_implementation="flash_attention_2"',
        use_flash_attention,
        "not run: needs a GPU and the package flash-attn",
    ),
    Feature("looped experts", 'experts_implementation="eager"', with_experts("eager"), EQUAL),
    Feature("grouped experts", 'experts_implementation="grouped_mm"', with_experts("grouped_mm"), EQUAL),
    Feature("batched experts", 'experts_implementation="batched_mm"', with_experts("batched_mm"), EQUAL),
    Feature("our experts", 'experts_implementation="fused_moe"', with_experts("fused_moe"), EQUAL),
    Feature("generation settings", "generation_config.json", use_generation_config, "works, saved settings apply"),
    Feature("no cache", "generate(use_cache=False)", lambda c: c.same_text(use_cache=False), SAME_TEXT),
    Feature(
        *("static cache", 'generate(cache_implementation="static")'),
        *(lambda c: c.same_text(cache_implementation="static"), SAME_TEXT),
    ),
    Feature(
        *("offloaded cache", 'generate(cache_implementation="offloaded")'),
        *(use_offloaded_cache, "not run: needs a GPU"),
    ),
    Feature(
        "beam search",
        "generate(num_beams=3)",
        lambda c: f"works, {len(c.generate(num_beams=3))} tokens",
        "works, 12 tokens",
    ),
    Feature(
        *("assisted generation", "generate(assistant_model=model)"),
        *(lambda c: c.same_text(assistant_model=c.model), SAME_TEXT),
    ),
    Feature(
        *("prompt lookup", "generate(prompt_lookup_num_tokens=3)"),
        *(lambda c: c.same_text(prompt_lookup_num_tokens=3), SAME_TEXT),
    ),
    Feature("left padding", 'tokenizer(texts, padding_side="left")', use_left_padding, SAME_TEXT),
    Feature(
        *("embeddings in", "model(inputs_embeds=...)"),
        *(lambda c: c.compare(c.model, inputs_embeds=c.model.get_input_embeddings()(c.ids)), EQUAL),
    ),
    Feature("extra outputs", "output_router_logits=True and the like", use_extra_outputs, "works"),
    Feature("new tokens", "resize_token_embeddings(n)", use_resize, "works, old logits kept"),
    Feature("checkpointing", "gradient_checkpointing_enable()", use_checkpointing, "works, equal gradients"),
    Feature("LoRA on attention", "LoraConfig(target_modules=...)", use_lora, "works, trains"),
    Feature("LoRA on experts", "LoraConfig(target_parameters=...)", use_lora_on_experts, "works, trains"),
    Feature("torch.compile", "torch.compile(model)", use_compile, EQUAL, True),
    Feature(
        *("continuous batching", "generate_batch(inputs)", use_continuous_batching),
        *("fails in transformers, its own DeepSeek-V3 alike: paged keys sized by `head_dim`, MLA's rotary part", True),
    ),
)


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    """A model with a dynamic number of experts per token, so that every feature meets unused slots."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("features") / "model"
    config = DeepseekConfig.from_preset("debug", vocab_size=300, initializer_range=0.1)
    assert config.has_dynamic_experts
    DeepseekForCausalLM(config).save_pretrained(path)
    train_tokenizer(["a fox and a crow sat on a wall"] * 4, 300).save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = tokenizer("a fox sat on", return_tensors="pt").input_ids
    with torch.no_grad():
        return Case(path, model, tokenizer, ids, model(ids).logits)


@pytest.mark.parametrize(
    "feature",
    [pytest.param(f, id=f.name, marks=[pytest.mark.slow] if f.is_slow else []) for f in FEATURES],
)
def test_a_feature_does_what_its_row_says(case, feature):
    assert feature.use(case) == feature.result


def write_table() -> str:
    lines = ["| feature | asked for by | result |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {f.name} | `{f.code}` | {f.result} |" for f in FEATURES)])


def test_the_feature_table_in_the_docs_is_this_one():
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = f"{before}{BEGIN}\n{write_table()}\n{END}{after}"
    if os.environ.get("UPDATE_DOCS"):
        DOCS.write_text(wanted, encoding="utf-8")
    assert text == wanted or os.environ.get("UPDATE_DOCS")
