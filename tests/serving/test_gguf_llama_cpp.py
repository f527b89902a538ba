"""Our GGUF files in llama.cpp itself: token ids, logits and greedy text against the model they were made of.

Needs llama-cpp-python, which is compiled at installation (10 to 15 CPU minutes, one thread)::

    pip install llama-cpp-python==0.3.36
    pytest -m slow tests/serving/test_gguf_llama_cpp.py

With UPDATE_DOCS=1 the measured table is written into the docs.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from deepseek_serving.fixed_experts import measure_fixed_experts
from deepseek_serving.gguf_export import export_gguf
from deepseek_training.data.tokenizer import train_tokenizer
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; see the top of this file")
pytest.importorskip("gguf")
pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[2] / "docs" / "sharing_and_serving.md"
BEGIN = "<!-- begin: llama.cpp, written by tests/serving/test_gguf_llama_cpp.py -->"
END = "<!-- end: llama.cpp -->"

# Digits, other alphabets, runs of white space, contractions, code: where ways of splitting text part.
PROMPTS = (
    "Once upon a time",
    "The patient was given 250 mg twice a day",
    "def add(a, b):\n    return a + b",
    "in 1999 the river rose 12.5 m",
    "It's what they'd've said, isn't it?",
    "   three spaces before, two  between",
    "tabs\tand\n\nempty lines\n",
    "caf\u00e9, na\u00efve, \u00fcber, \u0153uvre",
    "\u041c\u043e\u0441\u043a\u0432\u0430 \u0438 \u041a\u0438\u0435\u0432",
    "\u4eca\u65e5\u306f\u5929\u6c17\u304c\u3044\u3044",
    "\u0661\u0662\u0663 \u0968\u0969 \u00bd \u00b2",
    "a \U0001f98a and a \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "e\u0301 is not \u00e9",
    "x=1;y=2;z=x+y#done",
    "ALL CAPS and MiXeD",
    "http://example.org/a?b=c&d=1",
    "quotes \u201clike these\u201d and 'those'",
    "a fox and a crow sat on a wall",
    "1,234,567.89",
    "0",
    " ",
    "non\u00a0breaking\u2003spaces",
    "<|begin|>User: hello<|end|>",
    "the the the the the the the the",
)
NEW_TOKENS = 16
FIXED = {"num_experts_per_tok": 3, "min_experts_per_tok": None}
SHAPE = {
    **{"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 4},
    **{"first_k_dense_replace": 1, "n_shared_experts": 2, "initializer_range": 0.15},
}
CASES = {
    "sigmoid, as DeepSeek-V3: groups, query latent, scaling 2.5": {
        **{"n_group": 2, "topk_group": 1, "q_lora_rank": 24, "routed_scaling_factor": 2.5},
        "tie_word_embeddings": False,
    },
    "sigmoid, no groups, two dense layers": {"first_k_dense_replace": 2},
    "softmax over the top-k": {"scoring_func": "softmax"},
    "softmax over all experts": {"scoring_func": "softmax", "norm_topk_prob": False},
    "softmax, attention over expert keys": {"scoring_func": "softmax", "router_key_dim": 8},
}
# fp32 in another order of operations on logits of order 1.
TOLERANCE = 1e-4
# With the cache rounded to fp16, a token whose experts are nearly tied takes another one; the rest move this little.
# Measured: 94.4 % of the tokens at worst (groups), else 99.7 % and more.
F16_TOLERANCE, F16_SHARE = 5e-2, 0.9


@dataclass(frozen=True)
class Parity:
    """What was measured on one case."""

    case: str
    num_tokens: int
    largest: float
    f16_share: float
    spread: float
    same_top: float
    same_ids: int
    same_texts: int


def save_model(path: Path, **overrides) -> DeepseekForCausalLM:
    """A random model with large weights and a router bias that decides, and a tokenizer with real merges."""
    torch.manual_seed(3)
    tokenizer = train_tokenizer([*PROMPTS] * 4, 400)
    settings = {"vocab_size": 400, **SHAPE, **FIXED, **overrides}
    model = DeepseekForCausalLM(DeepseekConfig.from_preset("debug", **settings)).eval()
    for name, tensor in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(torch.randn_like(tensor) * 0.1)
    for name, tensor in model.named_parameters():
        if name.endswith("norm.weight"):
            tensor.data.uniform_(0.5, 1.5)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


def load(path: Path, *, cache: str):
    """llama.cpp with its cache in fp32 or, as it does by default, in fp16."""
    kind = {"f32": llama_cpp.GGML_TYPE_F32, "f16": llama_cpp.GGML_TYPE_F16}[cache]
    return llama_cpp.Llama(
        *(str(path),), n_ctx=256, logits_all=True, type_k=kind, type_v=kind, flash_attn=False, n_threads=1,
        n_threads_batch=1, verbose=False,
    )  # fmt: skip


def logits_of(llama, ids: list[int]) -> torch.Tensor:
    llama.reset()
    llama.eval(ids)
    return torch.from_numpy(llama.scores[: len(ids)].copy())


def write_greedily(llama, ids: list[int]) -> list[int]:
    llama.reset()
    llama.eval(ids)
    written = []
    while len(written) < NEW_TOKENS:
        written.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        llama.eval(written[-1:])
    return written


def measure(case: str, folder: Path, model: DeepseekForCausalLM, file: Path) -> Parity:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    ours = [model(torch.tensor([ids])).logits[0].detach() for ids in prompts]
    written = [generate(model, ids) for ids in prompts]
    llama = load(file, cache="f32")
    theirs = [logits_of(llama, ids) for ids in prompts]
    texts = [write_greedily(llama, ids) for ids in prompts]
    tokens = [llama.tokenize(text.encode(), add_bos=False, special=True) for text in PROMPTS]
    llama.close()
    llama = load(file, cache="f16")
    rounded = [logits_of(llama, ids) for ids in prompts]
    llama.close()
    ours, theirs, rounded = torch.cat(ours), torch.cat(theirs), torch.cat(rounded)
    return Parity(
        case=case,
        num_tokens=len(ours),
        largest=float((ours - theirs).abs().max()),
        f16_share=float(((ours - rounded).abs().amax(-1) < F16_TOLERANCE).float().mean()),
        spread=float(ours.std()),
        same_top=float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        same_ids=sum(a == b for a, b in zip(prompts, tokens, strict=True)),
        same_texts=sum(a == b for a, b in zip(written, texts, strict=True)),
    )


def generate(model, ids: list[int]) -> list[int]:
    """Greedy tokens; nothing stops them, so that every prompt is compared over as many."""
    out = model.generate(
        torch.tensor([ids]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )
    return out[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> list[Parity]:
    rows = []
    for case, overrides in CASES.items():
        folder = tmp_path_factory.mktemp("model")
        model = save_model(folder, **overrides)
        rows.append(measure(case, folder, model, export_gguf(folder, folder / "model.gguf")))
    return rows


def test_logits_texts_and_token_ids_are_ours(measured):
    for row in measured:
        assert row.same_ids == len(PROMPTS), row
        assert row.largest < TOLERANCE and row.same_top == 1.0 and row.spread > 0.5, row
        assert row.f16_share > F16_SHARE, row
        assert row.same_texts == len(PROMPTS) >= 20, row


def test_a_dynamic_number_of_experts_runs_at_a_fixed_one_with_the_price_that_was_measured(tmp_path):
    model = save_model(tmp_path, min_experts_per_tok=1, num_experts_per_tok=4, expert_top_p=0.7)
    with pytest.raises(ValueError, match="--fixed-experts"):
        export_gguf(tmp_path, tmp_path / "model.gguf")
    llama = load(export_gguf(tmp_path, tmp_path / "model.gguf", fixed_experts=3), cache="f32")
    told = measure_fixed_experts(tmp_path, 3)
    from transformers import AutoTokenizer

    from deepseek_serving.fixed_experts import PROBE

    ids = AutoTokenizer.from_pretrained(tmp_path)(PROBE).input_ids
    ours = model(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
    theirs = logits_of(llama, ids).log_softmax(-1)
    kl = float((ours.exp() * (ours - theirs)).sum(-1).mean())
    assert told.num_tokens == len(ids) >= 100 and kl > 1e-4  # the two do differ
    assert told.mean_kl == pytest.approx(kl, rel=1e-2)


def write_table(rows: list[Parity]) -> str:
    texts = len(PROMPTS)
    lines = [
        "| router | tokens | standard deviation of our logits | largest logit difference | same likeliest token | "
        "same token ids | same greedy text | fp16 cache: tokens within 0.05 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row.case} | {row.num_tokens} | {row.spread:.2f} | {row.largest:.1e} | {row.same_top:.0%} | "
            f"{row.same_ids} of {texts} | {row.same_texts} of {texts} | {row.f16_share:.1%} |"
        )
    return "\n".join(lines)


def test_the_docs_name_every_case_that_was_measured(measured):
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    held, _, after = rest.partition(END)
    if os.environ.get("UPDATE_DOCS"):
        DOCS.write_text(f"{before}{BEGIN}\n{write_table(measured)}\n{END}{after}", encoding="utf-8")
        return
    assert [line.split("|")[1].strip() for line in held.strip().splitlines()[2:]] == list(CASES)
