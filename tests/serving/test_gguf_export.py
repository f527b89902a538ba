import json
import shutil

import pytest
import torch

from deepseek_serving.fixed_experts import measure_fixed_experts
from deepseek_serving.gguf_export import export_gguf
from deepseek_training.data.tokenizer import train_tokenizer
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

gguf = pytest.importorskip("gguf")

FIXED = {"num_experts_per_tok": 2, "min_experts_per_tok": None}
CASES = {
    "sigmoid": {},
    "softmax": {"scoring_func": "softmax"},
    "softmax over all": {"scoring_func": "softmax", "norm_topk_prob": False},
    "query latent, own head": {"q_lora_rank": 20, "tie_word_embeddings": False},
    "groups": {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5},
    "expert keys": {"router_key_dim": 8},
    "two dense layers": {"first_k_dense_replace": 2, "num_hidden_layers": 3, "n_shared_experts": 2},
}


def save_model(path, **overrides) -> DeepseekForCausalLM:
    """A small model with large weights and a router bias that is not zero, so that whatever gets lost shows."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 24, "num_hidden_layers": 2}
    config = DeepseekConfig.from_preset(
        "debug", **{"vocab_size": 300, "initializer_range": 0.2, **sizes, **FIXED, **overrides}
    )
    model = DeepseekForCausalLM(config).eval()
    for name, tensor in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(torch.randn_like(tensor) * 0.2)
    for name, tensor in model.named_parameters():
        if name.endswith("norm.weight"):
            tensor.data.uniform_(0.5, 1.5)
    model.save_pretrained(path)
    train_tokenizer(["a fox and a crow sat on a wall in 1999"] * 4, config.vocab_size).save_pretrained(path)
    return model


class Gguf:
    """llama.cpp's deepseek2 graph written out again over a file's tensors and settings; nothing of transformers."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        self.settings = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {}
        for tensor in reader.tensors:
            data = torch.from_numpy(tensor.data.copy())
            if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
                data = data.view(torch.bfloat16)
            # ggml names dimensions from the innermost; numpy's order is the reverse.
            self.tensors[tensor.name] = data.float().reshape(tuple(int(n) for n in reversed(tensor.shape)))

    def get(self, key, default=None):
        return self.settings.get(f"deepseek2.{key}", default)

    def norm(self, x, name):
        eps = self.get("attention.layer_norm_rms_epsilon")
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * self.tensors[name]

    def linear(self, x, name):
        return x @ self.tensors[name].T

    def rotate(self, x):
        """Rotary positions over neighboring pairs, `[T, ..., rope]`."""
        size = x.shape[-1]
        frequencies = self.get("rope.freq_base") ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles = torch.arange(len(x), dtype=torch.float64)[:, None] * frequencies
        angles = angles.view(len(x), *[1] * (x.dim() - 2), -1)
        cos, sin = angles.cos().float(), angles.sin().float()
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    def attend(self, x, b):
        rank, heads = self.get("attention.kv_lora_rank"), self.get("attention.head_count")
        if self.get("attention.q_lora_rank"):
            q = self.linear(
                self.norm(self.linear(x, b + "attn_q_a.weight"), b + "attn_q_a_norm.weight"), b + "attn_q_b.weight"
            )
        else:
            q = self.linear(x, b + "attn_q.weight")
        q = q.view(len(x), heads, self.get("attention.key_length_mla"))
        rope = self.get("rope.dimension_count")
        q_nope, q_rope = q[..., :-rope], self.rotate(q[..., -rope:])
        latent = self.linear(x, b + "attn_kv_a_mqa.weight")
        k_rope = self.rotate(latent[:, rank:])
        latent = self.norm(latent[:, :rank], b + "attn_kv_a_norm.weight")
        q_latent = torch.einsum("tnp,nrp->tnr", q_nope, self.tensors[b + "attn_k_b.weight"])
        scores = torch.einsum("tnr,sr->nts", q_latent, latent) + torch.einsum("tnr,sr->nts", q_rope, k_rope)
        scores = scores / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), float("-inf")).softmax(-1)
        out = torch.einsum("nts,sr->tnr", scores, latent)
        out = torch.einsum("tnr,nvr->tnv", out, self.tensors[b + "attn_v_b.weight"]).flatten(1)
        return self.linear(out, b + "attn_output.weight")

    def feed(self, x, b, suffix=""):
        gate = torch.nn.functional.silu(self.linear(x, f"{b}ffn_gate{suffix}.weight"))
        return self.linear(gate * self.linear(x, f"{b}ffn_up{suffix}.weight"), f"{b}ffn_down{suffix}.weight")

    def route(self, x, b):
        logits = self.linear(x, b + "ffn_gate_inp.weight")
        kind = self.get("expert_gating_func")
        probs = logits.sigmoid() if kind == 2 else {1: logits.softmax(-1)}[kind]
        choice = probs + self.tensors[b + "exp_probs_b.bias"]
        groups = self.get("expert_group_count", 1)
        if groups > 1:
            grouped = choice.view(len(x), groups, -1)
            best = grouped.topk(2, -1).values.sum(-1).topk(self.get("expert_group_used_count"), -1).indices
            closed = torch.ones(len(x), groups, dtype=torch.bool).scatter(1, best, False)
            choice = grouped.masked_fill(closed[..., None], float("-inf")).flatten(1)
        chosen = choice.topk(self.get("expert_used_count"), -1).indices
        weights = probs.gather(1, chosen)
        if self.get("expert_weights_norm"):
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights * self.get("expert_weights_scale")

    def logits(self, ids):
        x = self.tensors["token_embd.weight"][ids]
        for i in range(self.get("block_count")):
            b = f"blk.{i}."
            x = x + self.attend(self.norm(x, b + "attn_norm.weight"), b)
            h = self.norm(x, b + "ffn_norm.weight")
            if i < self.get("leading_dense_block_count"):
                x = x + self.feed(h, b)
                continue
            chosen, weights = self.route(h, b)
            gate, up, down = (self.tensors[f"{b}ffn_{part}_exps.weight"][chosen] for part in ("gate", "up", "down"))
            inner = torch.nn.functional.silu(torch.einsum("tkfd,td->tkf", gate, h)) * torch.einsum(
                "tkfd,td->tkf", up, h
            )
            routed = torch.einsum("tkdf,tkf,tk->td", down, inner, weights)
            x = x + routed + self.feed(h, b, "_shexp")
        return self.linear(self.norm(x, "output_norm.weight"), "output.weight")


@pytest.mark.parametrize("case", CASES)
def test_the_file_computes_the_models_logits(case, tmp_path):
    """Witness: llama.cpp's graph, written out from its source over the file alone."""
    model = save_model(tmp_path, **CASES[case])
    file = Gguf(export_gguf(tmp_path, tmp_path / "model.gguf"))
    ids = torch.randint(3, 300, (19,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    # fp32 in another order of operations; the logits are of order 1.
    torch.testing.assert_close(file.logits(ids), expected, atol=2e-5, rtol=1e-4)


def test_half_types_keep_their_bits_and_the_router_stays_fp32(tmp_path):
    save_model(tmp_path / "fp32")
    for dtype, kind in ((torch.bfloat16, "BF16"), (torch.float16, "F16")):
        folder = tmp_path / kind
        model = DeepseekForCausalLM.from_pretrained(tmp_path / "fp32", dtype=dtype)
        model.save_pretrained(folder)
        shutil.copy(tmp_path / "fp32" / "tokenizer.json", folder)
        shutil.copy(tmp_path / "fp32" / "tokenizer_config.json", folder)
        reader = gguf.GGUFReader(export_gguf(folder, folder / "model.gguf"))
        kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        assert kinds["blk.1.ffn_up_exps.weight"] == kinds["token_embd.weight"] == kind
        assert (
            kinds["blk.1.ffn_gate_inp.weight"]
            == kinds["blk.1.exp_probs_b.bias"]
            == kinds["output_norm.weight"]
            == "F32"
        )
        stored = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight").data
        expected = model.model.embed_tokens.weight.detach().contiguous().view(torch.uint8).numpy()
        assert stored.tobytes() == expected.tobytes()


def test_deepseeks_own_checkpoints_are_taken(tmp_path):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    ours = save_model(tmp_path / "ours")
    keys = DeepseekV3Config().to_dict().keys() - {"model_type", "transformers_version", "architectures", "dtype"}
    settings = {key: value for key, value in ours.config.to_dict().items() if key in keys}
    stock = DeepseekV3ForCausalLM(DeepseekV3Config(**settings))
    stock.save_pretrained(tmp_path / "stock")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "ours" / name, tmp_path / "stock")
    file = Gguf(export_gguf(tmp_path / "stock", tmp_path / "stock.gguf"))
    ids = torch.arange(3, 20)
    with torch.no_grad():
        torch.testing.assert_close(file.logits(ids), stock(ids[None]).logits[0], atol=2e-5, rtol=1e-4)


def test_the_vocabulary_and_its_merges_are_the_tokenizers(tmp_path):
    save_model(tmp_path, vocab_size=310)  # ten rows more than the tokenizer has tokens
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    settings = Gguf(export_gguf(tmp_path, tmp_path / "model.gguf")).settings
    by_id = {index: text for text, index in state["model"]["vocab"].items()}
    tokens, kinds = settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.token_type"]
    assert len(tokens) == 310 and all(tokens[i] == text for i, text in by_id.items())
    special = {token["id"] for token in state["added_tokens"]}
    assert [i for i, kind in enumerate(kinds) if kind == 3] == sorted(special)
    assert [i for i, kind in enumerate(kinds) if kind == 5] == [i for i in range(310) if i not in by_id]
    assert settings["tokenizer.ggml.merges"] == [" ".join(pair) for pair in state["model"]["merges"]]
    assert settings["tokenizer.ggml.pre"] == "smollm" and settings["tokenizer.ggml.model"] == "gpt2"


def test_a_dynamic_number_of_experts_needs_a_fixed_one_and_its_price_is_measured(tmp_path):
    model = save_model(tmp_path, num_experts_per_tok=3, min_experts_per_tok=1)
    with pytest.raises(ValueError, match=r"min_experts_per_tok=1 .* --fixed-experts") as error:
        export_gguf(tmp_path, tmp_path / "model.gguf")
    assert "\n" not in str(error.value)
    file = Gguf(export_gguf(tmp_path, tmp_path / "two.gguf", fixed_experts=2))
    assert file.get("expert_used_count") == 2
    text = "a fox sat on a wall, and a crow sat on a fox"
    measured = measure_fixed_experts(tmp_path, 2, text)
    # Witness: the exported file's own logits against the dynamic model's.
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tmp_path)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        logps, others = model(ids).logits[0].log_softmax(-1), file.logits(ids[0]).log_softmax(-1)
    kl = (logps.exp() * (logps - others)).sum(-1).mean()
    assert measured.num_tokens == ids.shape[1] and measured.mean_kl == pytest.approx(float(kl), abs=1e-6)
    assert measured.mean_kl > 1e-3  # the two do differ
    assert f"of {ids.shape[1]} tokens" in str(measured)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"norm_type": "layernorm"}, "norm_type='layernorm'"),
        ({"rope_interleave": False}, "rope_interleave=False"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters="),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"num_hidden_layers": 27, "q_lora_rank": 20}, "num_hidden_layers=27 with q_lora_rank=20"),
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_what_the_graph_cannot_compute_is_refused_by_name(tmp_path, change, name):
    save_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=name) as error:
        export_gguf(tmp_path, tmp_path / "model.gguf")
    assert "\n" not in str(error.value) and not (tmp_path / "model.gguf").exists()


def test_a_tokenizer_that_llama_cpp_splits_differently_is_refused(tmp_path):
    save_model(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"no equal of the pre_tokenizer Digits\+ByteLevel"):
        export_gguf(tmp_path, tmp_path / "model.gguf")


def test_bad_targets_and_sources_end_in_one_line(tmp_path):
    save_model(tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "out")
    assert (tmp_path / "out" / "model.gguf").is_file()
    with pytest.raises(FileExistsError, match=r"model\.gguf exists"):
        export_gguf(tmp_path / "model", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="absent"):
        export_gguf(tmp_path / "absent", tmp_path / "a.gguf")
    with pytest.raises(ValueError, match=r"--fixed-experts: 99 is outside 1\.\.n_routed_experts=8"):
        export_gguf(tmp_path / "model", tmp_path / "a.gguf", fixed_experts=99)
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.mlp\.experts\.0\.gate_proj"):
        _lose_a_tensor(tmp_path / "model", "model.layers.1.mlp.experts.0.gate_proj.weight")
        export_gguf(tmp_path / "model", tmp_path / "a.gguf")


def _lose_a_tensor(folder, name):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_checkpoint_cut_short_ends_in_one_line(tmp_path):
    save_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model\.safetensors is cut short or damaged") as error:
        export_gguf(tmp_path, tmp_path / "a.gguf")
    assert "\n" not in str(error.value)
