"""Cut a smaller model out of a larger one, without training it.

``deepseek-moe shrink`` calls `shrink`. The result is a run folder whose ``model/`` every other command takes, with
bits per byte before and after on held-out text; `distill` or `adapt` heal it.
"""

import time
from pathlib import Path

from deepseek_records.hashes import hash_model, hash_tokenizer
from deepseek_records.loading import check_vocabulary, load_model, load_tokenizer
from deepseek_records.run_folder import RunFolder
from deepseek_records.summary import Summary
from deepseek_training.compress.calibration import calibration_blocks, shuffled_blocks
from deepseek_training.compress.student import cut_student, plan_cut_student, read_config
from deepseek_training.compress.student_config import describe_cut
from deepseek_training.data.corpus import Corpus
from deepseek_training.data.packing import encode_documents
from deepseek_training.data.texts import data_name, describe_data
from deepseek_training.recipes.loading import recipe_settings
from deepseek_training.recipes.shrink import ShrinkSettings
from deepseek_training.trainer.held_out import HeldOut
from deepseek_training.trainer.new_model import check_context
from deepseek_training.trainer.outcome import bits_rows

__all__ = ["ShrinkSettings", "shrink"]


def shrink(
    settings: ShrinkSettings, output: str | Path, *, overwrite: bool = False, is_dry: bool = False
) -> Summary | None:
    """Cut a model and return the summary.

    Args:
        settings: What to cut, and by what text.
        output: The run folder.
        overwrite: Delete whatever run the folder holds.
        is_dry: Print what would be cut, write nothing, and return None.

    Raises:
        FileExistsError: The folder holds another run.
        FileNotFoundError: The model or a data set is missing.
        ValueError: The smaller model is not a slice of the larger one, or the text is too short.
    """
    started = time.monotonic()
    original = read_config(settings.model)
    config = plan_cut_student(original, settings.student)
    _check_widths(settings)
    check_context(settings, config)
    tokenizer = load_tokenizer(settings.model)
    corpus = Corpus.load(settings.data, settings.data_column)
    blocks = shuffled_blocks(encode_documents(corpus.train, tokenizer), settings.sequence_length)
    calibration = calibration_blocks(blocks, settings.calibration_tokens, original)
    values = recipe_settings(settings)
    if is_dry:
        if not overwrite:
            RunFolder.check(output, values)
        print(f"{describe_cut(original, config)}\ndry run: nothing was written", flush=True)
        return None
    model = load_model(settings.model, dtype="auto")
    check_vocabulary(model, tokenizer)
    run = RunFolder.create(output, values, command="shrink", overwrite=overwrite)
    run.hold_to(model=hash_model(model), tokenizer=hash_tokenizer(tokenizer))
    held_out = HeldOut.prepare(data_name(settings.data), corpus.validation, tokenizer, settings.eval_bytes)
    student, experts = cut_student(
        model, config, calibration, experts_by=settings.experts_by, batch_size=settings.batch_size
    )
    before, after = (held_out.measure(one, settings) for one in (model, student))
    student.save_pretrained(run.model_path)
    tokenizer.save_pretrained(run.model_path)
    summary = Summary(
        stage="shrink",
        base_model=settings.model,
        results=bits_rows({held_out.name: before}, when="before") + bits_rows({held_out.name: after}, when="after"),
        data=(describe_data(settings.data, "validation", held_out.texts, "evaluation"),),
        seconds=round(time.monotonic() - started, 1),
        num_parameters=student.num_parameters(),
        details={
            "cut": describe_cut(original, config),
            "experts_kept": experts,
            "calibration_tokens": calibration.numel(),
        },
    )
    return run.finish(summary)


def _check_widths(settings: ShrinkSettings) -> None:
    """Refuse widths that torch's grouped products, which measure the result, do not take: rows of 16 bytes or more."""
    for name in ("hidden_size", "moe_intermediate_size"):
        width = settings.student.get(name)
        if isinstance(width, int) and width % 8:
            raise ValueError(f"student: {name}: got {width}, expected a multiple of 8")
