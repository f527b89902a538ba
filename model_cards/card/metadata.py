"""The metadata block of a model card, and the evaluation results in both formats the Hub reads.

``model-index`` (in the card's YAML) holds every result of the final model; ``.eval_results/*.yaml`` holds those of
benchmarks that exist as Hub data sets. The Hub's own validator needs the network, so `check_metadata` checks offline
what that validator would refuse. Surprising: neither format has a field for a standard error, so it travels in the
metric's ``args`` there and in ``notes`` here.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from deepseek_model_cards.benchmarks import benchmark_of, chance_level
from deepseek_model_cards.wording import label_metric
from deepseek_records.json_files import read_object
from deepseek_records.stages import Stage, final_stage, is_number
from deepseek_records.summary import Result

PIPELINE_TAGS = {"text-generation", "text-classification", "feature-extraction"}
LICENCES = {
    *("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "openrail", "other", "unknown"),
    *("cc-by-sa-4.0", "cc-by-nc-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "bsd-2-clause", "unlicense"),
}


def build_metadata(stages: dict[str, Stage], *, name: str, licence: str, config: dict[str, Any]) -> ModelCardData:
    """Return the card's metadata, read from the run.

    Args:
        stages: What `read_stages` gave.
        name: The model's name in ``model-index``.
        licence: The licence of the weights, as the Hub spells it.
        config: The model's ``config.json``, or an empty dictionary where no stage made a model.

    Raises:
        ValueError: Something the Hub would refuse.
    """
    is_classifier = any("SequenceClassification" in cls for cls in config.get("architectures") or [])
    bases = base_models(stages)
    results = model_index_results(stages)
    data = ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="text-classification" if is_classifier else "text-generation",
        tags=_tags(stages, config),
        language=sorted({code for stage in stages.values() for row in stage.data for code in row.languages}) or None,
        datasets=sorted(
            {
                row.hub_id
                for stage in stages.values()
                for row in stage.data
                if row.hub_id and row.used_for == "training"
            }
        )
        or None,
        base_model=bases or None,
        base_model_relation="finetune" if bases else None,
        metrics=sorted({row.metric_type for row in results}) or None,
        model_name=name,
        eval_results=results or None,
    )
    check_metadata(data.to_dict())
    return data


def base_models(stages: dict[str, Stage]) -> list[str]:
    """Return the Hub ids of the models that the run started from.

    Args:
        stages: What `read_stages` gave; a stage's summary says what it began with. What is a local
            path is no base model in the Hub's sense and is left out.
    """
    named = {stage.summary.base_model for stage in stages.values() if stage.summary and stage.summary.base_model}
    return sorted(name for name in named if is_hub_id(name))


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


def _tags(stages: dict[str, Stage], config: dict[str, Any]) -> list[str]:
    tags = ["deepseek-moe", "mixture-of-experts", "deepseek"]
    if config.get("model_type"):
        tags.append(config["model_type"])
    if config.get("auto_map"):
        tags.append("custom_code")
    if "align" in stages:
        tags += ["reinforcement-learning", "ppo"]
    return tags


@dataclass(frozen=True)
class Measured:
    """A figure with the stage that measured it.

    Args:
        stage: The stage.
        result: The figure.
    """

    stage: Stage
    result: Result


def results_of_final_model(stages: dict[str, Stage]) -> list[Measured]:
    """Return the results that describe the model the run ended with, not one on the way to it.

    A result counts if the stage that measured it made the final model, or ran after it, and it was not measured before
    training. Where a metric was measured twice, the later one holds.

    Args:
        stages: What `read_stages` gave.
    """
    names = list(stages)
    maker = final_stage(stages)
    first = names.index(maker.name) if maker else 0
    held: dict[tuple[str | None, ...], Measured] = {}
    for name in names[first:]:
        for row in stages[name].results:
            if row.when != "before":
                held[row.metric, row.dataset, row.split, row.task] = Measured(stages[name], row)
    return list(held.values())


def model_index_results(stages: dict[str, Stage]) -> list[EvalResult]:
    """Return the final model's results in the ``model-index`` form.

    Args:
        stages: What `read_stages` gave.
    """
    return [_to_eval_result(found.result) for found in results_of_final_model(stages)]


def _to_eval_result(row: Result) -> EvalResult:
    dataset = row.dataset or "not named"
    known = benchmark_of(row) or {}
    extra = {key: value for key, value in (("stderr", row.stderr), ("n", row.n)) if value is not None}
    shots = row.num_fewshot
    label = label_metric(row.metric)
    return EvalResult(
        task_type="text-generation",
        dataset_type=known.get("hub_id", re.sub(r"[^\w./-]+", "-", dataset)),
        dataset_name=known.get("name", dataset),
        dataset_config=known.get("config"),
        dataset_split=row.split,
        dataset_args={"num_few_shot": shots} if shots is not None else None,
        metric_type=row.metric,
        metric_name=f"{label} ({shots}-shot)" if shots is not None else label,
        metric_value=row.value,
        metric_args=extra or None,
    )


def write_eval_results(stages: dict[str, Stage], folder: str | Path) -> list[Path]:
    """Write one ``.eval_results/<benchmark>.yaml`` for each benchmark measured on the final model.

    Args:
        stages: What `read_stages` gave.
        folder: Where the model card lies; ``.eval_results/`` is made in it.

    Returns:
        The files, none if no benchmark was run.
    """
    import yaml

    by_benchmark: dict[str, list[EvalResultEntry]] = {}
    for found in results_of_final_model(stages):
        benchmark = benchmark_of(found.result)
        if benchmark:
            entry = _to_entry(found.result, benchmark["hub_id"], found.stage)
            by_benchmark.setdefault(benchmark["key"], []).append(entry)
    target = Path(folder) / ".eval_results"
    files = []
    for key, entries in by_benchmark.items():
        target.mkdir(parents=True, exist_ok=True)
        files.append(target / f"{key}.yaml")
        text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
        files[-1].write_text(text, encoding="utf-8")
    return files


def _to_entry(row: Result, hub_id: str, stage: Stage) -> EvalResultEntry:
    named = (("metric", row.metric), ("stderr", row.stderr), ("n", row.n))
    notes = [f"{key} {value}" for key, value in named if value is not None]
    if row.num_fewshot is not None:
        notes.append(f"{row.num_fewshot}-shot")
    if row.prompt_style:
        notes.append(f"{row.prompt_style} prompts")
    if row.task not in (None, benchmark_of(row)["key"]):
        notes.append(f"task {row.task}")
    if chance_level(row) is not None:
        notes.append(f"chance {chance_level(row)}")
    date = stage.environment.started
    return EvalResultEntry(
        dataset_id=hub_id,
        task_id=row.metric,
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
    if data.get("license") not in LICENCES:
        raise ValueError(f"license: {data.get('license')!r} is none of {', '.join(sorted(LICENCES))}")
    if data.get("pipeline_tag") not in PIPELINE_TAGS:
        raise ValueError(f"pipeline_tag: {data.get('pipeline_tag')!r} is none of {', '.join(sorted(PIPELINE_TAGS))}")
    for key in ("datasets", "base_model"):
        for repo_id in data.get(key) or []:
            try:
                validate_repo_id(repo_id)
            except HFValidationError as error:
                raise ValueError(f"{key}: {repo_id!r} is no Hub id ({error})") from None
    for language in data.get("language") or []:
        if not re.fullmatch(r"[a-z]{2,3}|code|multilingual", language):
            raise ValueError(f"language: {language!r} is no ISO 639 code of two or three letters")
    for tag in data.get("tags") or []:
        if not isinstance(tag, str) or not tag.strip():
            raise ValueError(f"tags: {tag!r} is no text")
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


def read_config(model_path: Path | None) -> dict[str, Any]:
    """Return a model's ``config.json``, empty where there is no model.

    Args:
        model_path: The model's folder or None.
    """
    return read_object(model_path / "config.json", "model") if model_path else {}
