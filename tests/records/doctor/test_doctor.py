"""Every planted fault is found, by its own check; clean set-ups of twenty kinds raise no alarm."""

import json
import string

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_families import build_tiny, find_experts_classes, loss_of, token_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deepseek_cli.main import main
from deepseek_records.doctor import CHECKS, examine, open_subject
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

CLASSES = {module.split(".")[2]: (module, name) for module, name in find_experts_classes()}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
)
TEMPLATE += "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
BALANCED = {"bias_update_speed": 0.001}


def tokenizer(**changes):
    """Letters as tokens: fewer than the tiny models' 97 rows."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *string.ascii_letters, *string.digits, *" .,?<>"]
    split = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    found = PreTrainedTokenizerFast(tokenizer_object=split, **{**names, **changes})
    found.chat_template = TEMPLATE
    return found


def save(folder, model, **changes):
    model.save_pretrained(folder)
    tokenizer(**changes).save_pretrained(folder)
    return folder


def family(folder, name, **changes):
    return save(folder, build_tiny(*CLASSES[name]), **changes)


def ours(folder, **settings):
    torch.manual_seed(0)
    return save(folder, DeepseekForCausalLM(DeepseekConfig.from_preset("debug", vocab_size=97, **settings)))


def lora(folder, name="mixtral", steps=20, targets=("experts.gate_up_proj", "experts.down_proj"), modules=()):
    """A LoRA adapter that was trained for some steps, and its base."""
    base = family(folder / "base", name)
    model = build_tiny(*CLASSES[name])
    config = LoraConfig(r=4, target_modules=list(modules), target_parameters=list(targets), task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        loss_of(adapted.get_base_model(), token_ids(seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(folder / "adapter")
    return base, folder / "adapter"


def repack(adapter):
    """Write B with the experts outermost, as a framework does that stacks 2-D adapters."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensors[name] = tensor.view(len(tensor), 4, 8).transpose(1, 2).reshape(len(tensor), 32).contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors")


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit_config(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def with_prediction_layers(folder):
    def add(tensors):
        layer = {k: v for k, v in tensors.items() if ".layers.3." in k}
        tensors.update({k.replace(".layers.3.", ".layers.4."): v.clone() for k, v in layer.items()})

    return edit_weights(family(folder, "deepseek_v3"), add)


def with_narrow_bias(folder):
    def narrow(tensors):
        tensors.update({k: v.bfloat16() for k, v in tensors.items() if k.endswith("e_score_correction_bias")})

    return edit_weights(family(folder, "glm4_moe"), narrow)


def with_jitter(folder):
    return edit_config(family(folder, "mixtral"), router_jitter_noise=0.5)


def with_dynamic_settings(folder):
    return edit_config(family(folder, "deepseek_v3"), min_experts_per_tok=1, target_experts_per_tok=1.5)


def with_template(folder, template):
    family(folder, "mixtral")
    changed = tokenizer()
    changed.chat_template = template
    changed.save_pretrained(folder)
    return folder


def worse_than_chance(folder):
    """Rows of the head in another order than the ids: the model is certain, of something else."""
    return edit_weights(family(folder, "mixtral"), lambda tensors: tensors["lm_head.weight"].mul_(200))


def wrong_adapter(folder):
    base, adapter = lora(folder)
    repack(adapter)
    return base, adapter


def foreign_adapter(folder):
    _, adapter = lora(folder / "other", "olmoe", 1, (), ("q_proj",))
    return ours(folder / "base"), adapter


NEW_QUESTION = "{% for m in messages %}<{{ m.role }}{{ loop.length }}>{{ m.content }}{% endfor %}{{ eos_token }}"
NO_END = TEMPLATE.replace("{{ eos_token }}", "")
CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"preserve_rng_state": False}}
POOLED = {"output_router_logits": True}
# By fault: its check, what makes the folder or base and adapter, and the recipe.
FAULTS = {
    "bias": ("bias never moves", lambda f: family(f, "deepseek_v3"), {"learning_rate": 1e-4}),
    "4bit": ("experts not quantized", lambda f: family(f, "mixtral"), {"load_in_4bit": True}),
    "mtp": ("prediction layers dropped", with_prediction_layers, None),
    "indexer": ("indexer frozen", lambda f: family(f, "deepseek_v32"), BALANCED),
    "lora": (
        "LoRA misses experts",
        lambda f: family(f, "qwen3_moe"),
        {"lora_target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
    ),
    "packed": ("B packed wrongly", wrong_adapter, None),
    "zero B": ("adapter without effect", lambda f: lora(f, steps=0), None),
    "foreign": ("adapter without effect", foreign_adapter, None),
    "pooled": ("pooled balance loss", lambda f: family(f, "mixtral"), POOLED),
    "times": (
        "balance loss times accumulation",
        lambda f: family(f, "olmoe"),
        {**POOLED, "gradient_accumulation_steps": 8},
    ),
    "bf16 bias": ("bias in few bits", with_narrow_bias, None),
    "pad": ("pad equals end", lambda f: family(f, "mixtral", pad_token="<eos>"), None),
    "jitter": ("routing differs when recomputed", with_jitter, CHECKPOINTED),
    "other end": ("mixed-up tokenizer", lambda f: family(f, "mixtral", eos_token="z"), None),
    "chance": ("mixed-up tokenizer", worse_than_chance, None),
    "question": ("untrainable chat template", lambda f: with_template(f, NEW_QUESTION), None),
    "no end": ("untrainable chat template", lambda f: with_template(f, NO_END), None),
    "dynamic": ("dynamic experts lost", with_dynamic_settings, None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(tmp_path, fault):
    check, make, recipe = FAULTS[fault]
    made = make(tmp_path)
    model, adapter = made if isinstance(made, tuple) else (made, None)
    found = examine(open_subject(model, adapter=adapter, recipe=recipe)).findings
    assert check in found
    others = found.keys() - {check}
    assert others <= ({"pooled balance loss"} if fault == "times" else set())
    assert all(line and "\n" not in line for finding in found.values() for line in (finding.message, finding.cure))


def test_prediction_layers_are_kept_by_our_own_stages(tmp_path, capsys):
    model = with_prediction_layers(tmp_path / "v3")
    assert main(["doctor", str(model), "--recipe", "sft-debug"]) in (0, 3)
    assert "prediction layers dropped" not in capsys.readouterr().out
    trl = tmp_path / "trl.yaml"
    trl.write_text("learning_rate: 1.0e-4\nmax_steps: 10\n")
    assert main(["doctor", str(model), "--recipe", str(trl)]) == 3
    assert "prediction layers dropped: " in capsys.readouterr().out


def test_every_check_has_a_planted_fault():
    assert {check for check, _, _ in FAULTS.values()} == set(CHECKS)


def dense(folder):
    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=4, pad_token_id=0)  # fmt: skip
    return save(folder, LlamaForCausalLM(config))


TRAINED = {**BALANCED, "gradient_checkpointing": True, "gradient_accumulation_steps": 4, "learning_rate": 1e-4}
FIXED = {"min_experts_per_tok": None, "target_experts_per_tok": None}
CLEAN = {
    **{
        name: (lambda f, name=name: family(f, name), TRAINED)
        for name in ("deepseek_v2", "deepseek_v3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe",
                     "granitemoe", "phimoe", "dots1", "ernie4_5_moe", "minimax_m2", "hunyuan_v1_moe")
    },
    "ours": (ours, TRAINED),
    "ours, fixed": (
        lambda f: ours(f, **FIXED),
        {**BALANCED, "router_aux_loss_coef": 0.1, "gradient_accumulation_steps": 2},
    ),
    "ours, predicting": (lambda f: ours(f, num_nextn_predict_layers=1, mtp_loss_coef=0.3), TRAINED),
    "dense": (dense, {"load_in_4bit": True, "lora_target_modules": ["down_proj"]}),
    "bias still on purpose": (lambda f: family(f, "deepseek_v3"), {"bias_update_speed": 0}),
    "LoRA of experts": (lora, TRAINED),
    "LoRA of experts with a bias": (lambda f: lora(f, "deepseek_v3"), TRAINED),
    "LoRA of attention": (lambda f: lora(f, "qwen3_moe", 2, (), ("q_proj", "v_proj")), TRAINED),
    "a recipe of a new model": (ours, {"preset": "nano", "model": {"router_bias_update_speed": 0.01}}),
    "no recipe": (lambda f: family(f, "deepseek_v3"), None),
}  # fmt: skip


@pytest.mark.parametrize("kind", CLEAN)
def test_a_clean_set_up_raises_no_alarm(tmp_path, kind):
    make, recipe = CLEAN[kind]
    made = make(tmp_path)
    model, adapter = made if isinstance(made, tuple) else (made, None)
    examination = examine(open_subject(model, adapter=adapter, recipe=recipe))
    assert not examination.findings
    assert len(examination.passed) + len(examination.not_checked) == len(CHECKS)


def test_the_command(tmp_path, capsys):
    folder = str(family(tmp_path, "deepseek_v3"))
    assert main(["doctor", folder, "--recipe", "sft-debug"]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("bias never moves: ") and "Cure: set bias_update_speed" in lines[0]
    assert lines[1].startswith("1 found, ")
    assert main(["doctor", folder, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["findings"] == [] and found["not_checked"]["bias never moves"] == "needs --recipe"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere/at/all"], "does not exist"),
        (["{model}", "--adapter", "{model}"], "holds no adapter_config.json"),
        (["{model}", "--recipe", "no-such-recipe"], "no file and no embedded recipe"),
        (["{model}", "--recipe", "{list}"], "holds no settings"),
        (["{model}", "--recipe", "{words}"], "gradient_accumulation_steps: got 'many', expected a number"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, words):
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "words.yaml").write_text("gradient_accumulation_steps: many\n")
    places = {"model": family(tmp_path / "model", "mixtral"), **{n: tmp_path / f"{n}.yaml" for n in ("list", "words")}}
    assert main(["doctor", *(argument.format(**places) for argument in arguments)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert words in error[-1]
