"""Learning on: one more text for the model of a finished run, kept only if the gate lets it.

``deepseek-moe update RUN --data NEW`` calls `update`. It replays earlier text from a reservoir, trains by the recipe's
method, forms candidates between the old weights and the new, picks one on half of the held-out text, and decides on
the other half. What is kept comes into force by the rename of a link; what is not leaves everything as it was.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed

from deepseek_records.hashes import hash_rows
from deepseek_records.loading import check_vocabulary
from deepseek_records.run_files import GATES_FILE
from deepseek_records.run_folder import RunFolder, write_json
from deepseek_records.summary import Check, Result, Summary
from deepseek_training.continual.continued_training import build_trainer, mix_replay, prepare_method, save_trained
from deepseek_training.continual.decision import Gate, MeasureDrift
from deepseek_training.continual.in_force import ensure_link
from deepseek_training.continual.lesson import Lesson
from deepseek_training.continual.update_run import (
    candidate_folder,
    choose_folder,
    clean,
    keep_candidate,
    promote,
    read_decision,
)
from deepseek_training.data.corpus import describe_corpora
from deepseek_training.data.recipe_blocks import check_text_training
from deepseek_training.launch.plan import announce, load_or_outline, plan_training
from deepseek_training.recipes.loading import recipe_settings
from deepseek_training.recipes.update import UpdateRecipe
from deepseek_training.trainer.interruption import leaving_a_checkpoint
from deepseek_training.trainer.run_start import open_run, training_arguments
from deepseek_training.trainer.stage_trainer import run_training

__all__ = ["UpdateRecipe", "update"]


def update(
    recipe: UpdateRecipe, run: Path, *, measure_drift: MeasureDrift | None = None, is_dry: bool = False
) -> Summary | None:
    """Teach a run's model one more text, keep the result if the gate lets it, and return the summary.

    Args:
        recipe: The settings; `model` is the old model's folder below the run.
        run: The run folder, owned by the caller.
        measure_drift: How far the routers have moved, for the record.
        is_dry: Print what would happen, write nothing, and return None.

    Raises:
        FileExistsError: An update with other settings was begun.
        FileNotFoundError: A text or the old model is missing.
        ValueError: A setting or a text cannot be used, or there is nothing to hold the gate to.
    """
    started, base = time.monotonic(), run / recipe.model
    lesson = Lesson.prepare(recipe, run, base)
    folder = choose_folder(run, recipe_settings(recipe))
    args = training_arguments(recipe, folder)
    stage = open_run(recipe, folder, args, command="update", is_dry=is_dry)
    if not is_dry:
        stage.hold_to(gate=hash_rows([one.texts for one in lesson.sets.all]))
        lesson.reservoir.save(base.parent)
        ensure_link(run)
    if read_decision(folder) is None:
        if not (folder / "trained").is_dir():
            _train(recipe, lesson, stage, base, args, is_dry=is_dry)
        if is_dry:
            return None
        candidates = {alpha: candidate_folder(folder, base, alpha) for alpha in recipe.alphas}
        gate = Gate(recipe, lesson.sets, lesson.tokenizer, args)
        told = {"update": folder.name, "base": recipe.model, "data": recipe.data, "method": recipe.method}
        write_json(folder / GATES_FILE, {**told, **gate.decide(base, candidates, measure_drift)})
    decision = read_decision(folder)
    assert decision is not None
    if decision["accepted"]:
        keep_candidate(folder, base, decision["alpha"])
        lesson.learned(recipe.seed).save(folder)
        promote(run, folder)
    summary = stage.finish(_summarize(recipe, lesson, decision, base, time.monotonic() - started))
    clean(folder)
    return summary


def _train(
    recipe: UpdateRecipe, lesson: Lesson, stage: RunFolder, base: Path, args: TrainingArguments, *, is_dry: bool
) -> None:
    """Train from the old model, and leave ``trained/``."""
    recipe = dataclasses.replace(recipe, model=str(base))
    model = load_or_outline(recipe.model, is_dry=is_dry)
    check_text_training(recipe, model, lesson.tokenizer)
    check_vocabulary(model, lesson.tokenizer)
    recipe, dataset = mix_replay(recipe, lesson.part, lesson.reservoir, args)
    adapted, esft = prepare_method(recipe, model, lesson.part)
    blocks = [lesson.part, *lesson.reservoir.parts]
    plan = plan_training(
        "update", recipe, args, adapted, data=lesson.sizes, blocks=blocks, num_trained=esft.num_trained
    )
    announce(plan, stage.path, is_first=True, is_dry=is_dry)
    if is_dry:
        return
    set_seed(recipe.seed)
    adapted = adapted.to(args.device)
    trainer = build_trainer(recipe, adapted, dataset, args, esft=esft, reservoir=lesson.reservoir)
    with leaving_a_checkpoint(trainer, stage):
        run_training(trainer, stage)
    save_trained(trainer.model, lesson.tokenizer, stage.path / "trained")


def _summarize(recipe: UpdateRecipe, lesson: Lesson, decision: dict[str, Any], base: Path, seconds: float) -> Summary:
    findings = decision["findings"]
    measured = [one for one in findings if one["kind"] in ("gain", "loss")]
    results = tuple(
        Result(
            metric="bits_per_byte",
            dataset=one["dataset"],
            split="validation",
            value=one[when],
            n=one["n"],
            when=when,
            higher_is_better=False,
        )
        for when in ("before", "after")
        for one in measured
        if when in one
    )
    evaluated: dict[str, Any] = {one.name: one.texts for one in lesson.sets.all}
    corpora = [lesson.new, *lesson.earlier]
    texts = [evaluated.get(name, []) for name, _, _ in lesson.sizes]
    return Summary(
        stage="update",
        base_model=str(base),
        results=results,
        data=describe_corpora(corpora, texts),
        checks=tuple(_check(one) for one in findings if "value" in one),
        seconds=round(seconds, 1),
        replay_share=recipe.replay_share,
        details={"accepted": decision["accepted"], "alpha": decision["alpha"], "method": recipe.method},
    )


def _check(finding: dict[str, Any]) -> Check:
    asked = {
        "gain": "bits per byte on {} fall",
        "loss": "bits per byte on {} stay within their bound",
        "order": "{} is likelier than with its words shuffled",
        "safety": "{} stay as safe",
        "text": "{} is safe to learn from",
    }
    return Check(
        name=asked[finding["kind"]].format(finding["dataset"]),
        value=finding["value"],
        bound=finding.get("limit"),
        passed=finding["passed"],
        dataset=finding["dataset"],
    )
