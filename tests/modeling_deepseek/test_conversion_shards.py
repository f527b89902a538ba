"""A checkpoint that is not whole is refused in one line that names the shard or the tensor."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM, DeepseekModel

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(stock, tmp_path):
    stock.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 4
    return tmp_path / "sharded"


def refused(folder, error=ValueError):
    with pytest.raises(error) as caught:
        DeepseekForCausalLM.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def rewrite(path, change):
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def test_a_whole_one_loads(stock, input_ids, folder):
    assert torch.equal(DeepseekForCausalLM.from_pretrained(folder)(input_ids).logits, stock(input_ids).logits)


def test_a_missing_shard(folder):
    shards(folder)[2].unlink()
    assert f"shard: {shards(folder)[1].parent}" in refused(folder, FileNotFoundError)
    assert "model-00003-of-" in refused(folder, FileNotFoundError)


@pytest.mark.parametrize(
    ("size", "message"),
    [(0, "header too small"), (7, "header too small"), (100, "invalid header length"), (-16, "not fully covered")],
)
def test_a_shard_cut_short(folder, size, message):
    shard = shards(folder)[1]
    shard.write_bytes(shard.read_bytes()[:size])
    assert shard.name in refused(folder) and message in refused(folder)


BROKEN = {
    "cut short": (lambda text: text[:100], "got no JSON (Expecting"),
    "empty": (lambda text: "", "got no JSON (Expecting value"),
    "a list": (lambda text: "[]", "has no metadata, expected an object"),
    "no map": (lambda text: '{"metadata": {}}', "has no weight_map, expected an object"),
    "no metadata": (lambda text: json.dumps({"weight_map": json.loads(text)["weight_map"]}), "has no metadata"),
    "an empty map": (lambda text: '{"metadata": {}, "weight_map": {}}', "has an empty weight_map"),
    "a number": (lambda text: '{"metadata": {}, "weight_map": {"a": 3}}', "has 3 for 'a', expected a file name"),
    "nested": (lambda text: "[" * 100_000, "got no JSON (maximum recursion depth"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_index_is_named(folder, kind):
    change, message = BROKEN[kind]
    (folder / INDEX).write_text(change((folder / INDEX).read_text()))
    assert refused(folder).startswith(f"index: {folder / INDEX}") and message in refused(folder)
    for loader in (DeepseekForCausalLM, DeepseekModel):
        with pytest.raises(ValueError, match=r"^index: "):
            loader.from_pretrained(folder.parent, subfolder=folder.name)
    (folder / INDEX).write_bytes(bytes(range(256)))
    assert "got no JSON ('utf-8' codec can't decode" in refused(folder)


def test_another_file_under_a_shards_name(folder):
    shards(folder)[1].write_bytes(b"<html>not found</html>" * 9)
    name = "model-00002" + shards(folder)[1].name[11:]
    assert f"{name}: got a file that is cut short or of another kind" in refused(folder)


def test_a_shard_under_anothers_name(folder):
    shutil.copy(shards(folder)[0], shards(folder)[1])
    assert f"{shards(folder)[1].name} lacks '" in refused(folder)


def test_an_index_that_names_what_no_shard_holds(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.9.mlp.made_up"] = shards(folder)[3].name
    (folder / INDEX).write_text(json.dumps(index))
    assert f"{shards(folder)[3].name} lacks 'model.layers.9.mlp.made_up'" in refused(folder)
    assert "no shard holds it (none like it)" in refused(folder)


@pytest.mark.parametrize(
    "gone",
    [
        "model.layers.2.self_attn.o_proj.weight",
        "model.layers.1.mlp.experts.3.up_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "lm_head.weight",
    ],
)
def test_a_tensor_that_is_nowhere(stock, tmp_path, gone):
    """transformers would begin it at random and go on, or, for an expert, complain of shapes."""
    stock.save_pretrained(tmp_path)
    rewrite(tmp_path / "model.safetensors", lambda tensors: {k: v for k, v in tensors.items() if k != gone})
    assert f"'{gone}'" in refused(tmp_path)


def test_an_expert_too_many(stock, tmp_path):
    stock.save_pretrained(tmp_path)
    extra = {f"model.layers.1.mlp.experts.8.{part}_proj.weight": torch.ones(2, 2) for part in ("gate", "up", "down")}
    rewrite(tmp_path / "model.safetensors", lambda tensors: {**tensors, **extra})
    assert "n_routed_experts=8, but holds 'model.layers.1.mlp.experts.8.down_proj.weight'" in refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.layers.0.self_attn.o_proj.weight", "(32, 20)"),
        ("model.layers.1.mlp.experts.2.up_proj.weight", "(24, 32)"),
        ("model.layers.2.mlp.experts.7.down_proj.weight", "(32, 24)"),
        ("lm_head.weight", "(97, 32)"),
    ],
)
def test_a_tensor_of_another_shape(folder, name, wanted):
    """transformers refers to "the above report", or takes the experts for missing."""
    shard = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    rewrite(shard, lambda tensors: {**tensors, name: torch.ones(4, 5)})
    assert refused(folder) == f"shard: {shard.name} holds {name!r} of shape (4, 5), expected {wanted}"


def test_sizes_may_differ_on_request(stock, tmp_path):
    stock.save_pretrained(tmp_path / "stock")
    ours = DeepseekForCausalLM.from_pretrained(tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")
    base = DeepseekModel.from_pretrained(tmp_path / "ours")
    assert torch.equal(base.embed_tokens.weight, stock.model.embed_tokens.weight)
    options = {"num_labels": 3, "ignore_mismatched_sizes": True}
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours", num_labels=1)
    scorer.save_pretrained(tmp_path / "scorer")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "scorer", **options)
    assert again.score.weight.shape == (3, 32)
    with pytest.raises(ValueError, match=r"holds 'score.weight' of shape \(1, 32\), expected \(3, 32\)"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "scorer", num_labels=3)


def test_what_the_caller_asks_to_begin_anew_is_begun(stock, tiny, tmp_path):
    """Another head, dynamic experts, attention over expert keys, multi-token prediction: named by transformers."""
    stock.save_pretrained(tmp_path / "stock")
    ours = DeepseekForCausalLM.from_pretrained(tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours", num_labels=1)
    assert torch.equal(scorer.model.embed_tokens.weight, stock.model.embed_tokens.weight)
    settings = {"min_experts_per_tok": 1, "router_key_dim": 6, "mtp_loss_coef": 0.1, "num_nextn_predict_layers": 1}
    _, info = DeepseekForCausalLM.from_pretrained(tmp_path / "stock", output_loading_info=True, **settings)
    assert {"model.layers.1.mlp.gate.share.state", "model.layers.1.mlp.gate.expert_keys"} <= info["missing_keys"]
    assert "model.layers.3.eh_proj.weight" in info["missing_keys"]


@pytest.mark.parametrize("auto", [DeepseekForCausalLM, DeepseekModel])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mtp_weights_survive_a_model_that_does_not_train_them(tiny, tmp_path, auto, dtype):
    torch.manual_seed(0)
    config = DeepseekConfig(**{**tiny, "num_nextn_predict_layers": 2}, mtp_loss_coef=0.3)
    DeepseekForCausalLM(config).save_pretrained(tmp_path / "first", max_shard_size="20KB")
    first = {name: value for path in shards(tmp_path / "first") for name, value in load_file(path).items()}
    loaded = auto.from_pretrained(tmp_path / "first", dtype=dtype)
    assert len(loaded.model.layers if auto is DeepseekForCausalLM else loaded.layers) == 3
    assert not [name for name in loaded.state_dict() if "layers.3." in name], "no part of the model"
    loaded.save_pretrained(tmp_path / "first", max_shard_size="10GB")  # Over the very files they came from.
    again = load_file(tmp_path / "first" / "model.safetensors")
    prefix = "" if auto is DeepseekForCausalLM else "model."
    mtp = {name for name in first if name.startswith(("model.layers.3.", "model.layers.4."))}
    assert len(mtp) > 60 and {name.removeprefix(prefix) for name in mtp} <= again.keys()
    for name in mtp:
        exact = torch.float32 if name.endswith("e_score_correction_bias") else dtype
        assert torch.equal(again[name.removeprefix(prefix)], first[name].to(exact)), name
    if auto is DeepseekForCausalLM:
        trained, info = auto.from_pretrained(tmp_path / "first", mtp_loss_coef=0.1, output_loading_info=True)
        assert not any(info.values()) and len(trained.model.layers) == 5


@pytest.mark.parametrize("mtp_loss_coef", [0.0, 0.1], ids=["carried", "trained"])
def test_export_takes_mtp_weights_along(tiny, input_ids, tmp_path, mtp_loss_coef):
    from deepseek_serving.hf_export import export_deepseek_v3

    torch.manual_seed(0)
    config = DeepseekConfig(**{**tiny, "num_nextn_predict_layers": 1}, mtp_loss_coef=0.3)
    DeepseekForCausalLM(config).save_pretrained(tmp_path / "first")
    loaded = DeepseekForCausalLM.from_pretrained(tmp_path / "first", mtp_loss_coef=mtp_loss_coef)
    export_deepseek_v3(loaded, tmp_path / "stock")
    first, out = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "stock"))
    assert first.keys() == out.keys() and all(torch.equal(first[name], out[name]) for name in first)


def test_half_an_mtp_layer_is_refused(tiny, tmp_path):
    config = DeepseekConfig(**{**tiny, "num_nextn_predict_layers": 1}, mtp_loss_coef=0.3)
    DeepseekForCausalLM(config).save_pretrained(tmp_path)
    gone = "model.layers.3.eh_proj.weight"
    rewrite(tmp_path / "model.safetensors", lambda tensors: {k: v for k, v in tensors.items() if k != gone})
    with pytest.raises(ValueError, match=r"lacks 'model\.layers\.3\.eh_proj\.weight', a tensor"):
        DeepseekForCausalLM.from_pretrained(tmp_path, mtp_loss_coef=0.1)
