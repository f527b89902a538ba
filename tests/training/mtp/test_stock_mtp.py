"""Prediction layers of stock models, trained: as our own class trains them, and saved under the official names."""

import copy
import json
import re

import pytest
import torch
import transformers
from mtp_checkpoints import SMALL, write_glm, write_mellum, write_v3
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import TINY
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_layers import MtpModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from deepseek_records.kept_mtp import keep_mtp
from deepseek_training.balance import ExpertBalanceCallback
from deepseek_training.mtp import train_mtp
from deepseek_training.mtp.stock_mtp import untrainable
from modeling_deepseek import DeepseekForCausalLM
from modeling_deepseek.draft_acceptance import count_drafts
from modeling_deepseek.families import find_moe_layers

pytestmark = pytest.mark.skipif(
    not hasattr(MtpModel, "forward_layer"), reason="older transformers builds the layers for drafting alone"
)


@pytest.fixture(scope="module")
def v3_paths(tmp_path_factory):
    return {depths: write_v3(tmp_path_factory.mktemp("v3"), depths) for depths in (1, 2)}


def load_trained(path, **options):
    return train_mtp(AutoModelForCausalLM.from_pretrained(path, **options))


def tensors_of(path):
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def as_ours(name):
    """The name that our class gives a tensor."""
    name = re.sub(r"mtp_layers\.(\d)", lambda match: f"layers.{TINY['num_hidden_layers'] + int(match[1])}", name)
    return name.replace("mtp_block.", "").replace("post_norm", "shared_head.norm")


def batches():
    """Padded rows with labels, some masked; sequences packed into one row; and no labels."""
    ids = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(11) < torch.tensor([[11], [7], [9]])).long()
    labels = ids.masked_fill(mask == 0, -100).masked_fill(torch.arange(11) < 3, -100)
    yield {"input_ids": ids, "attention_mask": mask, "labels": labels}
    packed = ids.flatten()[None]
    yield {"input_ids": packed, "position_ids": torch.arange(11).repeat(3)[None], "labels": packed, "use_cache": False}
    yield {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}  # padded in front


@pytest.mark.parametrize("depths", [1, 2])
def test_loss_and_gradients_are_those_of_our_class(v3_paths, depths):
    stock = load_trained(v3_paths[depths]).train()
    ours = DeepseekForCausalLM.from_pretrained(v3_paths[depths], mtp_loss_coef=0.3).train()
    for batch in batches():
        for model in (stock, ours):
            model.zero_grad()
            output = model(**batch)
            (output.logits.sum() * 0 if output.loss is None else output.loss).backward()
        wanted = {name: parameter.grad for name, parameter in ours.named_parameters()}
        found = {as_ours(name): parameter.grad for name, parameter in stock.named_parameters()}
        assert found.keys() == wanted.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-7, msg=name)
        assert all(found[f"model.layers.{3 + depth}.eh_proj.weight"].any() for depth in range(depths))
        assert batch.get("labels") is None or torch.equal(stock.eval()(**batch).loss, ours.eval()(**batch).loss)
        stock.train(), ours.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_they_are_saved_bit_for_bit(v3_paths, tmp_path, dtype):
    source = v3_paths[2]
    if dtype is torch.bfloat16:
        source = tmp_path / "bf16"
        model = DeepseekForCausalLM.from_pretrained(v3_paths[2], dtype=dtype)
        model.save_pretrained(source)
        (source / "config.json").write_text((v3_paths[2] / "config.json").read_text().replace("float32", "bfloat16"))
    load_trained(source).save_pretrained(tmp_path / "saved")
    wanted, found = tensors_of(source), tensors_of(tmp_path / "saved")
    assert wanted.keys() == found.keys()
    assert not {n for n in wanted if not torch.equal(found[n], wanted[n]) or found[n].dtype != wanted[n].dtype}
    index = json.loads((tmp_path / "saved/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()


def trainer_of(model, folder, steps, callbacks=(), **settings):
    rows = torch.randint(3, 97, (16, 12), generator=torch.Generator().manual_seed(2))
    args = TrainingArguments(
        folder, max_steps=steps, save_steps=2, learning_rate=1e-2, per_device_train_batch_size=2, report_to=[],
        gradient_accumulation_steps=2, seed=0, use_cpu=True, disable_tqdm=True, logging_steps=100, **settings,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(model, args, train_dataset=data, callbacks=list(callbacks))


@pytest.mark.slow
def test_in_a_trainer_as_our_class_and_resumed(v3_paths, tmp_path):
    """Accumulation, recomputed layers, moving biases; stopped at step 2 of 4 and gone on with."""
    ours = DeepseekForCausalLM.from_pretrained(v3_paths[1], mtp_loss_coef=0.3)
    callback = ExpertBalanceCallback(1e-3)
    trainer_of(ours, tmp_path / "ours", 4, [callback], gradient_checkpointing=True).train()
    wanted = ours.state_dict()
    stock = load_trained(v3_paths[1])
    assert len(find_moe_layers(stock)) == 3
    biases = [layer.bias.clone() for layer in find_moe_layers(stock)]
    trainer_of(stock, tmp_path / "stock", 4, [ExpertBalanceCallback(1e-3)], gradient_checkpointing=True).train()
    for name, tensor in stock.state_dict().items():
        torch.testing.assert_close(tensor, wanted[as_ours(name)], rtol=1e-3, atol=2e-5, msg=name)
    moved = [layer.bias - before for layer, before in zip(find_moe_layers(stock), biases, strict=True)]
    assert all(0 < move.abs().max() < 8e-3 for move in moved)  # at most twice the speed a step, being centered
    resumed = load_trained(v3_paths[1])
    trainer = trainer_of(resumed, tmp_path / "again", 4, [ExpertBalanceCallback(1e-3)], gradient_checkpointing=True)
    trainer.train(resume_from_checkpoint=str(tmp_path / "stock/checkpoint-2"))
    assert all(torch.equal(t, stock.state_dict()[name]) for name, t in resumed.state_dict().items())


def pattern(rows=8, length=16):
    """Counting up by one from a random start: every later token follows from any earlier one."""
    starts = torch.randint(3, 90, (rows, 1), generator=torch.Generator().manual_seed(0))
    return 3 + (starts + torch.arange(length)) % 90


def train(model, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model.train()(input_ids=pattern(), labels=pattern()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.mtp_loss.last


@pytest.mark.parametrize("write", [write_glm, write_mellum])
def test_other_families_learn_and_keep_their_names(write, tmp_path):
    names = write(tmp_path)
    model = load_trained(tmp_path)
    first = train(model, 1)
    assert train(model, 12) < 0.8 * first
    before = tensors_of(tmp_path)
    model.save_pretrained(tmp_path / "saved")
    found = tensors_of(tmp_path / "saved")
    assert found.keys() == before.keys()
    assert all(not torch.equal(found[name], before[name]) for name in names if "e_score" not in name)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    built = train_mtp(copy.deepcopy(again)).state_dict()
    assert all(torch.equal(built[name], tensor) for name, tensor in model.state_dict().items())


def test_the_saved_folder_drafts_with_what_was_learned(v3_paths, tmp_path):
    model = load_trained(v3_paths[1])
    train(model, 40)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^use_mtp: True is not allowed for a model that trains"):
        model.generate(pattern(1, 4), use_mtp=True, max_new_tokens=2)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    keep_mtp(saved)  # the class knows the names in a model of the released size only
    prompt, options = pattern(1, 4), {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    with count_drafts(saved) as drafts:
        text = saved.generate(prompt, use_mtp=True, **options)
    assert torch.equal(text, saved.generate(prompt, **options))
    saved.config.name_or_path = str(v3_paths[1])  # the layers as they were
    with count_drafts(saved) as before:
        saved.generate(prompt, use_mtp=True, **options)
    assert drafts.acceptance_rate > before.acceptance_rate + 0.3


def test_off_in_evaluation_and_without_gradients(v3_paths):
    model = load_trained(v3_paths[1])
    batch = next(batches())
    model.eval()(**batch)
    with torch.no_grad():
        model.train()(**batch)
    assert model.mtp_loss.last is None


@pytest.mark.slow
def test_compiled_it_has_the_same_gradients(v3_paths):
    batch, gradients = next(batches()), []
    for compiles in (False, True):
        model = load_trained(v3_paths[2], experts_implementation="grouped_mm").train()
        called = torch.compile(model, backend="aot_eager") if compiles else model
        called(**batch).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradient, gradients[0][name], rtol=1e-4, atol=1e-7, msg=name)


def test_a_copy_trains_its_own_layers(v3_paths):
    model = load_trained(v3_paths[1])
    twin = copy.deepcopy(model)
    train(twin, 1)
    name = "model.mtp_layers.0.eh_proj.weight"
    assert not torch.equal(twin.state_dict()[name], model.state_dict()[name]) and model.mtp_loss.last is None


def test_lora_leaves_them_and_trains_them_if_asked(v3_paths, tmp_path):
    source = tensors_of(v3_paths[1])
    layer = r"model\.layers\.3\."
    targets = {"target_modules": ["o_proj"], "exclude_modules": r".*mtp_layers.*"}
    adapted = get_peft_model(load_trained(v3_paths[1]), LoraConfig(r=2, **targets))
    assert train(adapted, 1) is None
    adapted.base_model.model.model.mtp_layers.requires_grad_(True)
    train(adapted, 2)
    adapted.save_pretrained(tmp_path / "adapter")
    assert not any("mtp" in name for name in tensors_of(tmp_path / "adapter"))
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = tensors_of(tmp_path / "merged")
    assert merged.keys() == source.keys()
    changed = {name for name in merged if not torch.equal(merged[name], source[name])}
    assert {n for n in source if re.match(layer, n) and "e_score" not in n} <= changed
    assert all(re.match(layer, name) or "o_proj" in name for name in changed)
    careless = get_peft_model(load_trained(v3_paths[1]), LoraConfig(r=2, target_modules=["o_proj"]))
    with pytest.raises(ValueError, match=r"^mtp: got an adapter on the prediction layers, expected none; pass"):
        train(careless, 1)


def test_refused_in_one_line(v3_paths, tmp_path):
    stock = AutoModelForCausalLM.from_pretrained(v3_paths[1])
    for coef in (0, -0.1, float("nan"), float("inf"), "0.3", None):
        with pytest.raises(ValueError, match=r"^mtp_loss_coef: got .*, expected a number above 0$"):
            train_mtp(stock, coef)
    with pytest.raises(ValueError, match=r"^mtp: got a model with an adapter, expected train_mtp before"):
        train_mtp(get_peft_model(copy.deepcopy(stock), LoraConfig(target_modules=["o_proj"])))
    with pytest.raises(ValueError, match=r"^mtp: got DeepseekForCausalLM, expected a model of transf.*coef=0\.3"):
        train_mtp(DeepseekForCausalLM.from_pretrained(v3_paths[1]))
    with pytest.raises(ValueError, match=r"^mtp: got a DeepseekV3ForCausalLM that train_mtp has prepared"):
        train_mtp(train_mtp(stock))
    with pytest.raises(ValueError, match=r"^mtp: got a model that was not loaded, expected a checkpoint with"):
        train_mtp(Glm4MoeForCausalLM(Glm4MoeConfig(**SMALL, n_routed_experts=4)))
    quantized = AutoModelForCausalLM.from_pretrained(v3_paths[1])
    quantized.is_quantized = True
    with pytest.raises(ValueError, match=r"^mtp: got a quantized model, expected bf16 or fp32 weights"):
        train_mtp(quantized)
    tensors = load_file(v3_paths[1] / "model.safetensors")
    for change, message in (
        ({"model.layers.3.eh_proj.weight_scale_inv": torch.ones(1, 1)}, "^mtp: got model.layers.3.* expected no FP8"),
        (
            {"model.layers.3.odd.weight": torch.ones(1)},
            "^mtp: got .*odd.weight, expected the tensors",
        ),
    ):
        save_file({**tensors, **change}, tmp_path / "model.safetensors", {"format": "pt"})
        DeepseekV3Config.from_pretrained(v3_paths[1]).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            load_trained(tmp_path)
    del tensors["model.layers.3.eh_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"^mtp: .*missing.*eh_proj"):
        load_trained(tmp_path)


def families():
    """Every class of transformers that says by which names it drops prediction layers."""
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    names = {name for mapping in mappings for one in mapping.values() for name in ([one] if type(one) is str else one)}
    for name in sorted(names):
        patterns = getattr(getattr(transformers, name), "_keys_to_ignore_on_load_unexpected", None) or ()
        if any(re.search(r"mtp|layers\\?\.\\?\d+", pattern) for pattern in patterns):
            yield name


@pytest.mark.slow
def test_every_family_that_drops_such_layers_is_trained_or_refused():
    """Empty: trained, by the tests above."""
    found = {}
    for name in families():
        cls = getattr(transformers, name)
        config = cls.config_class()
        if config.get_text_config() is config:  # on two layers; of a model that also sees, nothing is built
            config = cls.config_class(num_hidden_layers=2)
            if hasattr(config, "num_mtp_layers") and not config.num_mtp_layers:
                config = cls.config_class(num_hidden_layers=2, num_mtp_layers=1)
            with torch.device("meta"):
                found[name] = untrainable(cls(config))
        else:
            model = torch.nn.Module()
            model.config = config
            found[name] = untrainable(model)
    trained = {name for name, reason in found.items() if not reason}
    assert trained == {"DeepseekV3ForCausalLM", "Glm4MoeForCausalLM", "MellumForCausalLM"}
    reasons = (
        "it takes more than text",
        "transformers does not build them, for its configuration has no num_mtp_layers",
        "layers of hybrid",
        "Calling `get_mtp_config` on a config containing `layer_types` without `mtp_layer_types` is ambiguous",
    )
    assert {*found.values()} <= {"", *reasons} and len(found) > 30
