"""Cut a smaller model out of a larger one, without training it.

``deepseek-moe shrink`` calls `shrink`. The result is a run folder whose ``model/`` every other command takes, with
bits per byte before and after on held-out text; `distill` or `adapt` heal it.
"""

import time
from pathlib import Path

from deepseek_records.loading import load_tokenizer
from deepseek_records.summary import Summary
from deepseek_training.compress.calibration import calibration_blocks, shuffled_blocks
from deepseek_training.compress.remaking import open_remaking
from deepseek_training.compress.student import cut_student, plan_cut_student, read_config
from deepseek_training.compress.student_config import describe_cut
from deepseek_training.data.corpus import Corpus
from deepseek_training.data.packing import encode_documents
from deepseek_training.recipes.shrink import ShrinkSettings
from deepseek_training.trainer.new_model import check_context

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
    told = describe_cut(original, config)
    remaking = open_remaking(
        settings,
        output,
        command="shrink",
        told=told,
        corpus=corpus,
        tokenizer=tokenizer,
        started=started,
        overwrite=overwrite,
        is_dry=is_dry,
    )
    if remaking is None:
        return None
    student, experts = cut_student(
        remaking.model, config, calibration, experts_by=settings.experts_by, batch_size=settings.batch_size
    )
    details = {"cut": told, "experts_kept": experts, "calibration_tokens": calibration.numel()}
    return remaking.finish_beside(student, details)


def _check_widths(settings: ShrinkSettings) -> None:
    """Refuse widths that torch's grouped products, which measure the result, do not take: rows of 16 bytes or more."""
    for name in ("hidden_size", "moe_intermediate_size"):
        width = settings.student.get(name)
        if isinstance(width, int) and width % 8:
            raise ValueError(f"student: {name}: got {width}, expected a multiple of 8")
