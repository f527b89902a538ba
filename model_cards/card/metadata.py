"""The metadata block of a model card, and the evaluation results in both formats the Hub reads.

``model-index`` (in the card's YAML) holds every result of the final model; ``.eval_results/*.yaml`` holds those of
benchmarks that exist as Hub data sets. The Hub's own validator needs the network, so `check_metadata` checks offline
what that validator would refuse. Neither format has a field for a standard error: it is in the metric's ``args`` there
and in ``notes`` here.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from deepseek_model_cards.card.license_facts import LICENSES, License
from deepseek_model_cards.card.model_facts import DRAWN, ModelFacts
from deepseek_model_cards.wording import label_figure
from deepseek_records.lineage import Lineage, find_parent
from deepseek_records.stages import Stage, is_number
from deepseek_records.summary import Benchmark, Result

PIPELINE_TAGS = {
    "text-generation",
    "text-classification",
    "feature-extraction",
    "image-text-to-text",
    "audio-text-to-text",
}


def build_metadata(
    lineage: Lineage, *, name: str, facts: ModelFacts, license: License, is_made_here: bool = False
) -> ModelCardData:
    """Return the card's metadata, read from the run and the model's folder.

    Args:
        lineage: The model's stages.
        name: The model's name in ``model-index``.
        facts: What the model's folder says.
        license: The license as far as it is known.
        is_made_here: Whether a stage of ours recorded that it made the model.

    Raises:
        ValueError: Something the Hub would refuse.
    """
    bases = base_models(lineage, facts)
    rows = [row for stage in lineage.stages.values() for row in stage.data]
    datasets = {row.hub_id for row in rows if row.hub_id and row.used_for == "training"}
    results = model_index_results(lineage)
    data = ModelCardData(
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag=facts.pipeline_tag,
        tags=_tags(lineage, facts, is_made_here) or None,
        language=sorted({code for row in rows if row.used_for == "training" for code in row.languages}) or None,
        datasets=sorted(datasets) or None,
        base_model=bases or None,
        base_model_relation=_relation(lineage, facts) if bases else None,
        metrics=sorted({row.metric_type for row in results}) or None,
        model_name=name if results else None,
        eval_results=results or None,
        **license.fields,
    )
    check_metadata(data.to_dict())
    return data


def _relation(lineage: Lineage, facts: ModelFacts) -> str:
    """How the model stands to the one that it was made from, in the Hub's words."""
    if any(stage.kind == "quantize" and stage.is_finished for stage in lineage.stages.values()):
        return "quantized"
    return "adapter" if facts.is_adapter else "finetune"


def base_models(lineage: Lineage, facts: ModelFacts) -> list[str]:
    """Return the Hub ids of the models that this one was made from.

    Args:
        lineage: The model's stages; the first says what it began with. A local path is not a base model in the Hub's
            sense and is left out.
        facts: What the model's folder says; an adapter names its base model.
    """
    return sorted({name for name in (lineage.base, facts.base) if name and is_hub_id(name)})


def is_hub_id(name: str) -> bool:
    """Tell whether a name can only be meant as ``owner/name`` on the Hub.

    Args:
        name: A Hub id, or a local path; one that exists is taken for local, as transformers takes it.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not Path(name).exists()


def _tags(lineage: Lineage, facts: ModelFacts, is_made_here: bool) -> list[str]:
    tags = ["deepseek-moe"] if is_made_here else []
    if facts.num_routed_experts:
        tags.append("mixture-of-experts")
    if facts.model_type in DRAWN:
        tags.append("deepseek")
    if facts.model_type:
        tags.append(facts.model_type)
    if facts.has_own_code:
        tags.append("custom_code")
    if facts.is_adapter:
        tags += ["adapter", str(facts.adapter.get("peft_type", "lora")).lower()]
    if facts.sees and facts.hears:
        tags.append("audio-text-to-text")  # the Hub takes one pipeline tag
    kinds = [stage.kind for stage in lineage.stages.values() if stage.is_finished]
    methods = [tag for kind, tag in (("dpo", "dpo"), ("align", "ppo"), ("grpo", "grpo")) if kind in kinds]
    return [*tags, *(["reinforcement-learning"] if {"ppo", "grpo"} & set(methods) else []), *methods]


@dataclass(frozen=True)
class Measured:
    """A figure with the stage that measured it.

    Args:
        stage: The stage.
        result: The figure.
    """

    stage: Stage
    result: Result


def results_of_final_model(lineage: Lineage) -> list[Measured]:
    """Return the results that describe the model the run ended with, not one on the way to it.

    A result counts if the stage that measured it made the final model, or ran after it, and it was not measured before
    training. Where a metric was measured twice, the later one holds.

    Args:
        lineage: The model's stages.
    """
    names = list(lineage.stages)
    first = names.index(lineage.final.name) if lineage.final else 0
    held: dict[tuple[str | None, ...], Measured] = {}
    for name in names[first:]:
        stage = lineage.stages[name]
        if not is_of_final_model(lineage, stage):
            continue
        for row in stage.results:
            if row.when != "before":
                held[row.metric, row.dataset, row.split, row.task] = Measured(stage, row)
    return list(held.values())


def is_of_final_model(lineage: Lineage, stage: Stage) -> bool:
    """Tell whether a stage made or measured the model that the run ended with.

    Args:
        lineage: The model's stages.
        stage: One of them.
    """
    if lineage.final is None or stage is lineage.final or stage.kind != "evaluate":
        return True
    return find_parent(stage, {lineage.final.name: lineage.final}) is not None


def model_index_results(lineage: Lineage) -> list[EvalResult]:
    """Return the final model's results in the ``model-index`` form.

    Args:
        lineage: The model's stages.
    """
    return [_to_eval_result(found.result) for found in results_of_final_model(lineage)]


def _to_eval_result(row: Result) -> EvalResult:
    dataset = row.label or row.dataset or "not named"
    benchmark = row.benchmark
    extra = {key: value for key, value in (("stderr", row.stderr), ("n", row.n)) if value is not None}
    shots = row.num_fewshot
    how = [f"{shots}-shot"] * (shots is not None) + ["chat prompts"] * (row.prompt_style == "chat")
    name = f"{label_figure(row)} ({', '.join(how)})" if how else label_figure(row)
    return EvalResult(
        task_type="text-generation",
        dataset_type=benchmark.hub_id if benchmark else re.sub(r"[^\w./-]+", "-", dataset),
        dataset_name=benchmark.name if benchmark else dataset,
        dataset_config=benchmark.config if benchmark else None,
        dataset_split=row.split,
        dataset_args={"num_few_shot": shots} if shots is not None else None,
        metric_type=row.metric,
        metric_name=name,
        metric_value=row.value,
        metric_args=extra or None,
    )


def write_eval_results(lineage: Lineage, folder: str | Path) -> list[Path]:
    """Write one ``.eval_results/<benchmark>.yaml`` for each registered benchmark run in full on the final model.

    Args:
        lineage: The model's stages.
        folder: Where the model card lies; ``.eval_results/`` is made in it.

    Returns:
        The files, none if no benchmark was run.
    """
    import yaml

    by_benchmark: dict[str, list[EvalResultEntry]] = {}
    for found in results_of_final_model(lineage):
        benchmark = found.result.benchmark
        if benchmark and benchmark.task_id:
            entry = _to_entry(found.result, benchmark, benchmark.task_id, found.stage)
            by_benchmark.setdefault(benchmark.hub_id.rpartition("/")[2].lower(), []).append(entry)
    target = Path(folder) / ".eval_results"
    files = []
    for key, entries in by_benchmark.items():
        target.mkdir(parents=True, exist_ok=True)
        files.append(target / f"{key}.yaml")
        text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
        files[-1].write_text(text, encoding="utf-8")
    return files


def _to_entry(row: Result, benchmark: Benchmark, task_id: str, stage: Stage) -> EvalResultEntry:
    named = (("metric", row.metric), ("stderr", row.stderr), ("n", row.n))
    notes = [f"{key} {value}" for key, value in named if value is not None]
    if row.num_fewshot is not None:
        notes.append(f"{row.num_fewshot}-shot")
    if row.prompt_style:
        notes.append(f"{row.prompt_style} prompts")
    if row.task:
        notes.append(f"task {row.task}")
    if row.chance is not None:
        notes.append(f"chance {row.chance:g}")
    date = stage.environment.started
    return EvalResultEntry(
        dataset_id=benchmark.hub_id,
        task_id=task_id,
        value=row.value,
        date=re.sub(r"([+-]\d\d)(\d\d)$", r"\1:\2", date) if date else None,
        notes="; ".join(notes),
    )


def check_metadata(data: dict[str, Any]) -> None:
    """Refuse what the Hub's validator would refuse, without the network.

    Args:
        data: The metadata as a plain dictionary, ``ModelCardData.to_dict()``.

    Raises:
        ValueError: A field with a value the Hub does not take; the message names the field.
    """
    if data.get("license") is not None and data["license"] not in LICENSES:
        raise ValueError(f"license: got {data['license']!r}, expected an id of the Hub's such as apache-2.0 or other")
    if data.get("pipeline_tag") not in PIPELINE_TAGS:
        raise ValueError(
            f"pipeline_tag: got {data.get('pipeline_tag')!r}, expected one of {', '.join(sorted(PIPELINE_TAGS))}"
        )
    for key in ("datasets", "base_model"):
        for repo_id in data.get(key) or []:
            try:
                validate_repo_id(repo_id)
            except HFValidationError as error:
                raise ValueError(f"{key}: got {repo_id!r}, expected a Hub id ({error})") from None
    for language in data.get("language") or []:
        if not re.fullmatch(r"[a-z]{2,3}|code|multilingual", language):
            raise ValueError(f"language: got {language!r}, expected an ISO 639 code of two or three letters")
    for tag in data.get("tags") or []:
        if not isinstance(tag, str) or not tag.strip():
            raise ValueError(f"tags: got {tag!r}, expected text")
    _check_model_index(data.get("model-index") or [])


def _check_model_index(index: list[dict[str, Any]]) -> None:
    for model in index:
        if not isinstance(model.get("name"), str) or not model["name"]:
            raise ValueError("model-index: a model without a name")
        for result in model["results"]:
            where = f"model-index: {result.get('dataset', {}).get('name')}"
            if not all(result.get(part, {}).get("type") for part in ("task", "dataset")):
                raise ValueError(f"{where}: task and dataset need a type")
            for metric in result["metrics"]:
                if not metric.get("type") or not is_number(metric.get("value")):
                    raise ValueError(
                        f"{where}: metric {metric.get('type')!r} needs a number, has {metric.get('value')!r}"
                    )
