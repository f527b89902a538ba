"""Experts in 4 bits in other people's models: small, frozen, adapted, saved, loaded piece by piece, put back."""

import gc
import weakref

import pytest
import torch
from peft import PeftModel
from test_expert_adapters import BASE, FAMILIES, IDS, adapt, logits, run
from transformers import AutoModelForCausalLM, GptOssConfig

from modeling_deepseek import FourBitExpertsConfig, dequantize_experts, four_bit_loading, quantize_experts

FORMATS = {"nf4": 32, "int4": 8}
GATED = [name for name in FAMILIES if name != "gpt_oss"]  # That one is biased and transposed, and refused below.
SIZES = {"moe_intermediate_size": 32, "intermediate_size": 48}  # Multiples of 8.


def build(name="qwen3_moe", dtype=torch.float32):
    config_class, settings = FAMILIES[name]
    torch.manual_seed(0)
    config = config_class(**{**BASE, **settings, **SIZES})
    model = AutoModelForCausalLM.from_config(config, experts_implementation="fused_moe")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


@pytest.fixture(params=FORMATS)
def fmt(request):
    return {"format": request.param, "group_size": FORMATS[request.param]}


@pytest.mark.parametrize("name", GATED)
def test_logits_and_adapters_gradients_equal_those_on_weights_read_back(name, fmt):
    model = adapt(quantize_experts(build(name), **fmt))
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    got, gradients = run(model, "fused_moe")
    dequantize_experts(model, torch.float32)
    expected, expected_gradients = run(model, "eager")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys() and gradients
    for key, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-5, msg=key)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_it_runs_by_whatever_implementation_is_set():
    model = quantize_experts(build(), group_size=32)
    expected = logits(model)
    model.set_experts_implementation("eager")
    assert torch.equal(logits(model), expected) and expected.isfinite().all()


def test_saved_and_loaded_and_quantized_while_loading(fmt, tmp_path):
    build().save_pretrained(tmp_path / "dense")
    model = quantize_experts(build(), **fmt)
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), expected)
    config = FourBitExpertsConfig(**fmt)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)
    adapted = adapt(again)
    adapted.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(loaded, tmp_path / "adapter")), logits(adapted))
    # The same adapter on the weights that were quantized.
    whole = PeftModel.from_pretrained(build(), tmp_path / "adapter")
    assert (logits(whole) - logits(adapted)).norm() < 0.5 * logits(whole).norm()


def test_loading_holds_one_projection_at_a_time(tmp_path, monkeypatch):
    build("qwen3_moe").save_pretrained(tmp_path)
    alive, most = [], []
    convert = four_bit_loading.QuantizeProjection.convert

    def count(self, input_dict, **kwargs):
        gc.collect()
        most.append(sum(reference() is not None for reference in alive))
        alive.extend(weakref.ref(v[0] if isinstance(v, list) else v) for v in input_dict.values())
        return convert(self, input_dict, **kwargs)

    monkeypatch.setattr(four_bit_loading.QuantizeProjection, "convert", count)
    AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=FourBitExpertsConfig(group_size=32))
    assert len(most) == 4 and max(most) <= 1


@pytest.mark.parametrize("wrap", [adapt, lambda model: model])
def test_moving_and_casting_makes_nothing_dense(wrap):
    model = wrap(quantize_experts(build(), group_size=32))
    for moved in (model.to(torch.bfloat16), model.to("meta")):
        shown = [p for name, p in moved.named_parameters() if "experts" in name and p.dim() == 3]
        assert len(shown) == 4 and all(p.stride() == (0, 0, 0) and not p.requires_grad for p in shown)
        assert {p.dtype for p in shown} == {torch.bfloat16}
    assert {p.device.type for p in shown} == {"meta"}


def test_merging_into_4_bits_is_refused(tmp_path):
    model = adapt(quantize_experts(build(), group_size=32))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="merge: got experts in 4 bits, expected ordinary weights"):
            merge()


def test_codes_stay_bit_for_bit_while_an_adapter_trains():
    model = adapt(quantize_experts(build(), format="int4", group_size=8))
    before = {key: value.clone() for key, value in model.state_dict().items() if "four_bit" in key}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    after = model.state_dict()
    assert before and all(torch.equal(after[key], value) for key, value in before.items())


def test_what_cannot_be_quantized_is_refused_in_one_line():
    with pytest.raises(ValueError, match="model: got NoneType, expected a loaded model"):
        quantize_experts(None)
    with pytest.raises(ValueError, match="4 bits already"):
        quantize_experts(quantize_experts(build(), group_size=32), group_size=32)
    with pytest.raises(ValueError, match="group_size: got 64, expected a divisor of gate_up_proj's 32 inputs"):
        quantize_experts(build(), format="int4", group_size=64)
    with pytest.raises(ValueError, match="format: got 'int8', expected one of nf4, int4"):
        quantize_experts(build(), format="int8")
    biased = AutoModelForCausalLM.from_config(GptOssConfig(**{**BASE, "num_local_experts": 4, "head_dim": 8}))
    with pytest.raises(ValueError, match="GptOssExperts with is_transposed=True"):
        quantize_experts(biased)
    with pytest.raises(ValueError, match="without fused experts"):
        quantize_experts(torch.nn.Linear(2, 2))


def trained(model, num_steps=50):
    """The losses of an adapter on attention and experts that learns one text by heart."""
    model = adapt(model, target_modules=["q_proj", "o_proj"], r=8, lora_alpha=16)
    ids = torch.randint(3, 2000, (4, 32), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(num_steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_26_million_parameters_take_a_third_and_learn_alike(name, capsys):
    from deepseek_cli.benchmarks.lora_cost import build as build_27m

    def model():
        return build_27m("full", 8).to(torch.bfloat16).requires_grad_(False)

    def num_bytes(module):
        return sum(t.untyped_storage().nbytes() for t in (*module.parameters(), *module.buffers()))

    small = quantize_experts(model(), format=name)
    share = num_bytes(small) / num_bytes(model())
    ours, dense = trained(small)[-1], trained(model())[-1]
    with capsys.disabled():
        print(f"{name}: bytes {share:.3f} of bf16, loss after 50 steps {ours:.4f}, on bf16 experts {dense:.4f}")
    assert share <= 0.33
    assert abs(ours - dense) <= 0.05 * dense
