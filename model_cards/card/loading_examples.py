"""The code and commands that a card prints: how to load this model, and how to export or measure it again.

Each way is printed only where the model's files say that it works. Tests run them as printed, on each kind of model.
"""

import shlex
from typing import Any

from deepseek_model_cards.card.model_facts import MULTIMODAL, OURS, ModelFacts
from deepseek_records.stages import Stage
from modeling_deepseek.packed_checkpoint import CT_METHOD

_PACKAGE = "import modeling_deepseek  # installed with deepseek-moe; registers the architecture\n"
_GENERATE = (
    'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
    "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))"
)
_CLASSIFY = 'inputs = tokenizer("Once upon a time", return_tensors="pt")\nprint(model(**inputs).logits)'
# Options of `deepseek-moe evaluate` that decide what is measured, by their setting; left out at these values.
_MEASURING = {
    "num_fewshot": None,
    "limit": None,
    "max_new_tokens": None,
    "num_samples": 1,
    "temperature": 0.0,
    "top_p": 1.0,
    "prompt_style": "base",
    "seed": 0,
}

_DENSE_TITLE = "With transformers and `pip install compressed-tensors`, which makes the experts dense"

Way = dict[str, str]


def loading_ways(facts: ModelFacts, place: str, base: str | None) -> list[Way]:
    """Return how the model is loaded: ``title``, ``language`` and ``code`` of each way that works.

    Args:
        facts: What the model's folder says.
        place: Its Hub id, or its folder as seen from the card.
        base: Of an adapter, the model that it goes on.
    """
    if facts.is_adapter:
        return [_adapter_way(facts, place, base)] if base else []
    if not facts.config:
        return []
    if facts.config.get("quantization_config", {}).get("quant_method") == CT_METHOD:
        return [_packed_way(facts, place), _way(_DENSE_TITLE, facts, place, package=facts.model_type == OURS)]
    if facts.model_type == MULTIMODAL:
        trusted = (False, True) if facts.has_own_code else (False,)
        return [_multimodal_way(facts, place, is_trusted=is_trusted) for is_trusted in trusted]
    if facts.model_type == OURS:
        ways = [_way("With the package", facts, place, package=True)]
        if facts.has_own_code:
            ways.append(_way("Without it, by the code beside the weights", facts, place, is_trusted=True))
        if can_export_to_v3(facts):
            ways.append(_export_way(place))
        return ways
    return [_way("With transformers", facts, place, is_trusted=facts.has_own_code)]


def _way(title: str, facts: ModelFacts, place: str, *, package: bool = False, is_trusted: bool = False) -> Way:
    name = "AutoModelForSequenceClassification" if facts.is_classifier else "AutoModelForCausalLM"
    # The tokenizer asks too: it reads the configuration, whose class may be remote code.
    load = f'from_pretrained("{place}"{", trust_remote_code=True" if is_trusted else ""})'
    lines = [f"from transformers import {name}" + (", AutoTokenizer" if facts.has_tokenizer else ""), ""]
    if facts.has_tokenizer:
        lines.append(f"tokenizer = AutoTokenizer.{load}")
    lines.append(f"model = {name}.{load}")
    if facts.has_tokenizer:
        lines.append(_CLASSIFY if facts.is_classifier else _GENERATE)
    return {"title": title, "language": "python", "code": (_PACKAGE if package else "") + "\n".join(lines)}


def _multimodal_way(facts: ModelFacts, place: str, *, is_trusted: bool) -> Way:
    trust = ", trust_remote_code=True" if is_trusted else ""
    media = 'images=Image.new("RGB", (32, 32), "red")' if facts.sees else "audio=np.zeros(4000, dtype=np.float32)"
    sign, what = ("<image>", "What is in the picture?") if facts.sees else ("<audio>", "What is heard?")
    lines = [
        "from PIL import Image" if facts.sees else "import numpy as np",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        f'processor = AutoProcessor.from_pretrained("{place}"{trust})',
        f'model = AutoModelForImageTextToText.from_pretrained("{place}"{trust})',
        f'text = "{sign}\\n{what}\\n"',
        "if processor.tokenizer.chat_template:",
        '    turns = [{"role": "user", "content": text.strip()}]',
        "    text = processor.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)",
        f'inputs = processor(text=text, {media}, return_tensors="pt")',
        "output = model.generate(**inputs, max_new_tokens=10)",
        'print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    title = "Without it, by the code beside the weights" if is_trusted else "With the package"
    return {"title": title, "language": "python", "code": ("" if is_trusted else _PACKAGE) + "\n".join(lines)}


def _packed_way(facts: ModelFacts, place: str) -> Way:
    lines = ["from deepseek_records.loading import load_model, load_tokenizer  # installed with deepseek-moe", ""]
    lines.append(f'model = load_model("{place}")')
    if facts.has_tokenizer:
        lines = [*lines[:2], f'tokenizer = load_tokenizer("{place}")', lines[2], _GENERATE]
    return {"title": "With the package, experts in 4 bits in memory", "language": "python", "code": "\n".join(lines)}


def _adapter_way(facts: ModelFacts, place: str, base: str) -> Way:
    lines = [
        "import modeling_deepseek  # installed with deepseek-moe; for base models of its architecture",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{base}")',
        f'model = PeftModel.from_pretrained(base, "{place}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{place if facts.has_tokenizer else base}")',
        _GENERATE,
    ]
    return {"title": "With its base model", "language": "python", "code": "\n".join(lines)}


def can_export_to_v3(facts: ModelFacts) -> bool:
    """Tell whether ``deepseek-moe export --to deepseek_v3`` takes the model.

    Args:
        facts: What the model's folder says.
    """
    from modeling_deepseek import DeepseekConfig
    from modeling_deepseek.deepseek_v3_range import obstacles_to_deepseek_v3

    is_causal = facts.config.get("architectures") in (None, ["DeepseekForCausalLM"])
    return is_causal and not obstacles_to_deepseek_v3(DeepseekConfig.from_dict(facts.config))


def _export_way(place: str) -> Way:
    code = f"deepseek-moe export {shlex.quote(place)} exported --to deepseek_v3"
    return {"title": "Exported to `exported`, a plain DeepSeek-V3 checkpoint", "language": "bash", "code": code}


def measuring_command(stage: Stage, tasks: list[str], place: str) -> str | None:
    """Return the command that measures tasks again on this model, None where it cannot be said.

    Args:
        stage: The evaluation.
        tasks: The tasks' names.
        place: The model's Hub id, or its folder as seen from the card.
    """
    settings = stage.settings
    if stage.kind != "evaluate" or not tasks or settings.get("data_path") or settings.get("adapter"):
        return None
    if set(tasks) - set(settings.get("tasks") or tasks):
        return None  # Described by a file of the user's own, which is not here.
    words = ["deepseek-moe", "evaluate", place, "--tasks", ",".join(tasks)]
    for name, default in _MEASURING.items():
        value = settings.get(name, default)
        if value != default:
            words += [f"--{name.replace('_', '-')}", _as_option(value, tasks)]
    return shlex.join([*words, "--output", "measured-again"])


def _as_option(value: Any, tasks: list[str]) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}={number}" for name, number in value.items() if name in tasks)
    return str(value)
