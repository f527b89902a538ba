"""Any model: dtype, device, adapters, experts implementation, and remote code only when asked for."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from deepseek_eval.model_loading import load_model

REFERENCE = Path(__file__).resolve().parent / "reference"
TOKENS = torch.tensor([[1, 7, 19, 300, 12]])


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(REFERENCE / "llama")
    # Not the usual start at zero, which would change nothing.
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(path)
    return path


def test_an_adapter_is_put_on_top(adapter):
    base = load_model(REFERENCE / "llama", dtype="float32").model
    adapted = load_model(REFERENCE / "llama", dtype="float32", adapter=str(adapter)).model
    expected = PeftModel.from_pretrained(load_model(REFERENCE / "llama", dtype="float32").model, adapter)
    torch.testing.assert_close(logits_of(adapted), logits_of(expected.eval()), rtol=0, atol=1e-5)
    assert not torch.allclose(logits_of(adapted), logits_of(base), atol=1e-3)


@pytest.mark.parametrize(("name", "kind"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_weights_take_the_type_asked_for(name, kind):
    assert {parameter.dtype for parameter in load_model(REFERENCE / "llama", dtype=name).model.parameters()} == {kind}


def test_experts_run_as_asked_and_give_the_same():
    scores = [
        logits_of(load_model(REFERENCE / "ours", dtype="float32", experts_implementation=name).model)
        for name in ("eager", "fused_moe", "grouped_mm")
    ]
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=0, atol=1e-4)


@pytest.fixture
def strange(tmp_path) -> Path:
    """A checkpoint with code of its own, which leaves a mark when it is run."""
    path = tmp_path / "strange"
    shutil.copytree(REFERENCE / "llama", path)
    config = json.loads((path / "config.json").read_text())
    names = {"AutoConfig": "strange.StrangeConfig", "AutoModelForCausalLM": "strange.StrangeForCausalLM"}
    config |= {"model_type": "strange", "architectures": ["StrangeForCausalLM"], "auto_map": names}
    (path / "config.json").write_text(json.dumps(config))
    (path / "strange.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"open({str(tmp_path / 'mark')!r}, 'w').close()\n"
        "class StrangeConfig(LlamaConfig):\n    model_type = 'strange'\n"
        "class StrangeForCausalLM(LlamaForCausalLM):\n    config_class = StrangeConfig\n"
    )
    return path


def test_remote_code_runs_only_when_asked_for(strange, tmp_path):
    with pytest.raises(ValueError, match=r"cannot be loaded .*trust_remote_code") as caught:
        load_model(strange)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mark").exists()
    loaded = load_model(strange, trust_remote_code=True, dtype="float32")
    assert (tmp_path / "mark").exists() and type(loaded.model).__name__ == "StrangeForCausalLM"
    torch.testing.assert_close(
        logits_of(loaded.model), logits_of(load_model(REFERENCE / "llama", dtype="float32").model)
    )


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("llama", {"device": "quantum"}, r"device = 'quantum' cannot be used"),
        ("llama", {"device": "meta"}, r"device = 'meta' cannot be used"),
        ("llama", {"experts_implementation": "no such"}, r"cannot be loaded .*no such"),
        ("ours", {"adapter": "ADAPTER"}, r"adapter: .* cannot be loaded \(Target modules"),
        ("llama", {"adapter": "nowhere/at/all"}, r"adapter: nowhere/at/all cannot be loaded .*does not exist"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(adapter, model, options, message):
    options = {key: str(adapter) if value == "ADAPTER" else value for key, value in options.items()}
    with pytest.raises(ValueError, match=message) as caught:
        load_model(REFERENCE / model, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_in_one_line():
    with pytest.raises(ValueError, match=r"device = 'cuda' cannot be used"):
        load_model(REFERENCE / "llama", device="cuda")
