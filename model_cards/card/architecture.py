"""What a card says of a model's architecture and of how it came about: rows and sentences from its own files.

A model outside DeepSeek's design is described by the settings that all families share; nothing is said of a router or
an attention that its configuration does not tell.
"""

from typing import Any

from deepseek_model_cards.card.block_picture import describe_block
from deepseek_model_cards.card.metadata import is_hub_id
from deepseek_model_cards.card.model_facts import ModelFacts
from deepseek_model_cards.card.parameter_table import ParameterTable
from deepseek_model_cards.wording import format_count
from deepseek_records.leaks import scrub
from deepseek_records.lineage import Lineage
from deepseek_records.stages import Stage

_DONE = {
    "pretrain": "pretrained from scratch",
    "adapt": "adapted by continued pretraining",
    "sft": "fine-tuned to answer",
    "dpo": "aligned by DPO",
    "align": "aligned by PPO",
    "grpo": "aligned by GRPO",
    "train": "trained with transformers' Trainer",
    "shrink": "cut out of a larger model",
    "upcycle": "made of a dense model: its experts began as copies of the dense feed-forward layers",
    "distill": "distilled from a teacher",
    "quantize": "quantized: its routed experts are in 4 bits, by AWQ",
}


def introduction(lineage: Lineage, facts: ModelFacts, table: ParameterTable | None) -> str:
    """Return the card's first sentences: what the model is, what it was made from, and by which stages.

    Args:
        lineage: The model's stages.
        facts: What the model's folder says.
        table: Its parameters, None where they are not known.
    """
    base = lineage.base or facts.base
    done = [_describe_stage(stage) for stage in lineage.stages.values() if stage.is_finished and stage.kind in _DONE]
    story = f"It was {', then '.join(done)}." if done else ""
    if base:
        named = f"`{scrub(base)}`" if is_hub_id(base) else f"the local folder `{scrub(base)}`"
        story = f"It starts from {named}. {story}".strip()
    if lineage.evaluated:
        story = f"The figures below were measured on `{scrub(lineage.evaluated)}`; no stage of this run made a model."
    if not lineage.stages:
        story = f"{story} How it was made is not recorded beside it.".strip()
    return f"{_what_it_is(facts, table)} {story}".strip()


def _what_it_is(facts: ModelFacts, table: ParameterTable | None) -> str:
    kind = "sequence classifier" if facts.is_classifier else "language model"
    if facts.is_adapter:
        rank = f" of rank {facts.adapter['r']}" if isinstance(facts.adapter.get("r"), int) else ""
        what = (
            f"An adapter ({str(facts.adapter.get('peft_type', 'PEFT')).replace('_', ' ')}{rank}) for a language model"
        )
    elif facts.is_drawn:
        what = f"A DeepSeek-style Mixture-of-Experts {kind}"
    elif facts.num_routed_experts:
        what = f"A Mixture-of-Experts {kind} of type `{facts.model_type}`"
    else:
        what = f"A {kind} of type `{facts.model_type}`" if facts.model_type else f"A {kind}"
    if table is None:
        return f"{what}."
    size = f"{what} with {format_count(table.total)} parameters"
    if table.active is None or table.active == table.total:
        return f"{size}."
    return f"{size}, of which {format_count(table.active)} work on each token."


def _describe_stage(stage: Stage) -> str:
    data = [f"`{row.name}`" for row in stage.data if row.used_for == "training"]
    return f"{_DONE[stage.kind]}{' on ' + ' and '.join(dict.fromkeys(data)) if data else ''}"


def architecture_rows(facts: ModelFacts, table: ParameterTable | None) -> list[tuple[str, str]]:
    """Return the rows of the table "Architecture"; none where there is no configuration.

    Args:
        facts: What the model's folder says.
        table: Its parameters, None where they are not known.
    """
    stored = [("stored as", ", ".join(table.dtypes))] if table else []
    if facts.is_adapter:
        return [*_adapter_rows(facts), *stored]
    if not facts.config:
        return []
    config = facts.language_config
    rows = _deepseek_rows(config) if facts.is_drawn else _common_rows(facts, config)
    rows += [
        (label, f"{config[key]:,} tokens")
        for label, key in (("vocabulary", "vocab_size"), ("context", "max_position_embeddings"))
        if isinstance(config.get(key), int)
    ]
    return rows + stored


def _adapter_rows(facts: ModelFacts) -> list[tuple[str, str]]:
    found = [(name, facts.adapter.get(name)) for name in ("target_modules", "target_parameters")]
    targets = [(name, value if isinstance(value, list) else [str(value)]) for name, value in found if value]
    return [
        ("method", str(facts.adapter.get("peft_type", "not stated"))),
        *[(name, str(facts.adapter[name])) for name in ("r", "lora_alpha") if facts.adapter.get(name)],
        *[(name.replace("_", " "), ", ".join(sorted(names))) for name, names in targets],
    ]


def _deepseek_rows(config: dict[str, Any]) -> list[tuple[str, str]]:
    words = describe_block(config)
    is_dynamic = (config.get("min_experts_per_tok") or config["num_experts_per_tok"]) < config["num_experts_per_tok"]
    target = config.get("target_experts_per_tok")
    cache = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    return [
        ("layers", f"{config['num_hidden_layers']}; {words['dense']}"),
        ("hidden size", f"{config['hidden_size']:,}"),
        ("attention", f"latent (MLA), {words['heads']}; the cache holds {cache:,} numbers per token and layer"),
        ("experts", f"{words['routed']}; {words['active']} work on each token; {words['shared']}"),
        ("router", f"{words['gate']}, {words['second']}, {words['third']}".replace("\n", " ")),
        ("norm", words["norm"]),
        *([("experts per token, target mean", f"{target:g}")] if is_dynamic and target else []),
    ]


def _common_rows(facts: ModelFacts, config: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        (label, f"{config[key]:,}")
        for label, key in (
            *(("layers", "num_hidden_layers"), ("hidden size", "hidden_size")),
            *(("attention heads", "num_attention_heads"), ("key-value heads", "num_key_value_heads")),
        )
        if isinstance(config.get(key), int)
    ]
    if facts.num_routed_experts:
        active = f"; {facts.num_active_experts} work on each token" if facts.num_active_experts else ""
        rows.append(("experts", f"{facts.num_routed_experts} routed experts{active}"))
    for label, key in (("expert width", "moe_intermediate_size"), ("feed-forward width", "intermediate_size")):
        if isinstance(config.get(key), int):
            rows.append((label, f"{config[key]:,}"))
    return rows


def parameter_rows(facts: ModelFacts, table: ParameterTable | None) -> dict[str, Any] | None:
    """Return the table of parameters by part; None where they are not known.

    Args:
        facts: What the model's folder says.
        table: The counts.
    """
    if table is None or not table.total:
        return None
    rows = [
        {"part": part, "count": f"{count:,}", "share": f"{count / table.total:.1%}"}
        for part, count in table.by_part.items()
    ]
    active = table.active if table.active != table.total else None
    return {
        "rows": rows,
        "total": f"{table.total:,}",
        "active": "" if active is None else f"{active:,}",
        "active_share": "" if active is None else f"{active / table.total:.1%}",
        "note": ""
        if active is None
        else f"Active: everything but the routed experts that a token skips, at {facts.num_active_experts} of "
        f"{facts.num_routed_experts} (the most the router may choose).",
    }
