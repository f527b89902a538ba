"""Released FP8 weights: a plain quantiser written here makes the checkpoint, transformers is the witness."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM
from modeling_deepseek.fp8_checkpoint import dequantize_blocks

# Several blocks a weight, and edges that do not divide: 208 rows are 1.6 blocks, as V3's 576 of kv_a_proj are 4.5.
SIZES = {"hidden_size": 160, "moe_intermediate_size": 136, "intermediate_size": 144, "kv_lora_rank": 200}
RELEASED = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def quantise(weight):
    """Block by block, in plain loops: `(fp8, scale_inv, dequantized in fp32)`."""
    rows, columns = weight.shape
    fp8 = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty((rows + 127) // 128, (columns + 127) // 128)
    plain = torch.empty(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = (slice(128 * i, min(128 * (i + 1), rows)), slice(128 * j, min(128 * (j + 1), columns)))
            scales[i, j] = weight[at].abs().max() / 448
            fp8[at] = (weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
            plain[at] = fp8[at].float() * scales[i, j]
    return fp8, scales, plain


def is_quantized(name):
    """As in the release: projections, in the multi-token prediction layer too; not norms, gates, embedding, head."""
    return name.endswith("_proj.weight") or name.endswith("kv_a_proj_with_mqa.weight")


@pytest.fixture
def released(tiny, tmp_path):
    """A folder in FP8 with one multi-token prediction layer, sharded, and its plain dequantized tensors."""
    torch.manual_seed(0)
    settings = {**tiny, **SIZES, "num_nextn_predict_layers": 1}
    model = DeepseekForCausalLM(DeepseekConfig(**settings, mtp_loss_coef=0.3)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    stored, plain = {}, {}
    for name, tensor in load_file(tmp_path / "bf16" / "model.safetensors").items():
        stored[name] = plain[name] = tensor
        if is_quantized(name):
            stored[name], stored[f"{name}_scale_inv"], plain[name] = quantise(tensor.float() * 7)
    folder = tmp_path / "released"
    folder.mkdir()
    DeepseekV3Config(**settings, dtype="bfloat16").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": RELEASED}))
    # Weights and their scales in different shards, as happens in the release.
    names, weight_map = sorted(stored), {}
    for number in range(3):
        file = f"model-0000{number + 1}-of-00003.safetensors"
        save_file({name: stored[name] for name in names[number::3]}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names[number::3], file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder, plain


@pytest.mark.parametrize("asked", ["auto", torch.float32, torch.bfloat16, None], ids=str)
def test_every_tensor_is_the_plain_dequantized_one(released, tmp_path, asked):
    folder, plain = released
    # Without a dtype, transformers 5 takes the configuration's.
    dtype = {"auto": torch.bfloat16, None: torch.bfloat16}.get(asked, asked)
    model, info = DeepseekForCausalLM.from_pretrained(
        folder, **({} if asked is None else {"dtype": asked}), mtp_loss_coef=0.1, output_loading_info=True
    )
    assert not any(info.values()) and model.dtype == dtype
    model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == plain.keys()
    assert sum(map(is_quantized, plain)) > 80 and any("layers.3.mlp.experts.7" in name for name in plain)
    for name, value in again.items():
        is_bias = name.endswith("e_score_correction_bias")
        assert torch.equal(value, plain[name].to(torch.float32 if is_bias else dtype)), name


def test_logits_are_those_of_stock_transformers_with_the_plain_weights(released, input_ids, tmp_path):
    folder, plain = released
    config = DeepseekV3Config.from_pretrained(folder)
    del config.quantization_config
    config.save_pretrained(tmp_path / "plain")
    first = {name: value.float().contiguous() for name, value in plain.items() if ".layers.3." not in name}
    save_file(first, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    stock = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    ours = DeepseekForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="auto")
    assert torch.equal(ours(input_ids).logits, stock(input_ids).logits)


def test_carried_mtp_weights_are_dequantized_too(released, tmp_path):
    folder, plain = released
    model = DeepseekForCausalLM.from_pretrained(folder, dtype="auto")
    assert len(model.model.layers) == 3
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == plain.keys()
    for name in (name for name in again if ".layers.3." in name and is_quantized(name)):
        assert torch.equal(again[name], plain[name].to(torch.bfloat16)), name


def test_one_log_line_says_so(released, caplog, monkeypatch):
    from transformers.utils import logging

    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    DeepseekForCausalLM.from_pretrained(released[0])
    lines = [record.getMessage() for record in caplog.records if "FP8" in record.getMessage()]
    assert lines == ["FP8 weights in blocks of 128 x 128 are dequantized; quantization_config is dropped"]


def edit(folder, change):
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        save_file(change(tensors), path, metadata={"format": "pt"})
    path = folder / "model.safetensors.index.json"
    path.unlink()
    weight_map = {name: file.name for file in folder.glob("*.safetensors") for name in load_file(file)}
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_weight_without_its_scales_is_refused(released):
    gone = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    edit(released[0], lambda tensors: {name: value for name, value in tensors.items() if name != gone})
    with pytest.raises(ValueError, match=r"holds 'model.layers.0.self_attn.o_proj.weight' in FP8, but no shard"):
        DeepseekForCausalLM.from_pretrained(released[0])


def test_scales_of_other_blocks_are_refused(released):
    name = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"  # of 136 x 160
    edit(
        released[0],
        lambda tensors: {key: torch.ones(1, 2) if key == name else value for key, value in tensors.items()},
    )
    with pytest.raises(
        ValueError, match=r"up_proj.weight_scale_inv' of shape \(1, 2\), expected \(2, 2\) for a weight"
    ):
        DeepseekForCausalLM.from_pretrained(released[0])


def test_scales_without_their_weight_are_refused(released):
    gone = "model.layers.1.mlp.experts.3.up_proj.weight"
    edit(released[0], lambda tensors: {name: value for name, value in tensors.items() if name != gone})
    with pytest.raises(ValueError, match=r"lacks 'model.layers.1.mlp.experts.3.up_proj.weight'"):
        DeepseekForCausalLM.from_pretrained(released[0])


def test_fp8_weights_that_the_configuration_does_not_mention_are_refused(released):
    path = released[0] / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"in FP8, but config.json has no quantization_config for it"):
        DeepseekForCausalLM.from_pretrained(released[0])


def test_other_scales_than_128_are_refused_or_used():
    weight, scale = torch.randn(5, 7), torch.rand(3, 4) + 0.5
    expected = weight * scale.repeat_interleave(2, 0)[:5].repeat_interleave(2, 1)[:, :7]
    assert torch.equal(dequantize_blocks(weight, scale, (2, 2), torch.float32), expected)
    with pytest.raises(ValueError, match=r"weight_scale_inv: got \(3, 4\), expected \(2, 2\) for \(5, 7\)"):
        dequantize_blocks(weight, scale, (4, 4), torch.float32)
