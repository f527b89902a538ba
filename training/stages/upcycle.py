"""Make a mixture of experts of a dense model, with the same function, without training it.

``deepseek-moe upcycle`` calls `upcycle`. The result is a run folder whose ``model/`` every other command takes, with
how far its logits are from the dense model's; `adapt` and `sft` then make its experts differ.
"""

import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from deepseek_records.exit_codes import RunFailedError
from deepseek_records.loading import load_tokenizer
from deepseek_records.summary import Summary
from deepseek_training.compress.remaking import open_remaking
from deepseek_training.compress.student import read_config
from deepseek_training.compress.student_config import outline
from deepseek_training.compress.upcycle import is_exact, upcycled_config
from deepseek_training.compress.upcycle import upcycle as upcycle_model
from deepseek_training.data.corpus import Corpus
from deepseek_training.recipes.upcycle import UpcycleSettings
from deepseek_training.trainer.held_out import HeldOut
from deepseek_training.trainer.new_model import check_context

__all__ = ["UpcycleSettings", "upcycle"]

# Of the largest logit: two models of one function differ by rounding, by dtype.
_MOST_DIFFERENCE = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.2}
# Share of positions: a token whose router ties changes all that follow it in its window.
_MOST_TIES = 0.5
_NUMBERS = ("n_routed_experts", "num_experts_per_tok", "granularity")


def upcycle(
    settings: UpcycleSettings, output: str | Path, *, overwrite: bool = False, is_dry: bool = False
) -> Summary | None:
    """Make the mixture and return the summary.

    Args:
        settings: Of which model, with how many experts.
        output: The run folder.
        overwrite: Delete whatever run the folder holds.
        is_dry: Print what would be made, write nothing, and return None.

    Raises:
        FileExistsError: The folder holds another run.
        FileNotFoundError: The model or a data set is missing.
        ValueError: The model cannot be upcycled, or the numbers of experts do not fit it.
        RunFailedError: The mixture computes something else than the dense model.
    """
    started = time.monotonic()
    original = read_config(settings.model)
    config = upcycled_config(original, **{name: getattr(settings, name) for name in _NUMBERS})
    check_context(settings, config)
    tokenizer = load_tokenizer(settings.model)
    corpus = Corpus.load(settings.data, settings.data_column)
    told = describe_upcycling(original, config, settings)
    remaking = open_remaking(
        settings,
        output,
        command="upcycle",
        told=told,
        corpus=corpus,
        tokenizer=tokenizer,
        started=started,
        overwrite=overwrite,
        is_dry=is_dry,
    )
    if remaking is None:
        return None
    sparse = upcycle_model(remaking.model, config, router_std=settings.router_std, seed=settings.seed)
    compared = _compare(remaking.model, sparse, remaking.held_out, settings)
    return remaking.finish_beside(sparse, {"upcycled": told, **compared})


def _compare(dense: PreTrainedModel, sparse: PreTrainedModel, held_out: HeldOut, settings: UpcycleSettings) -> Any:
    """What `compare_logits` gives; fails where the mixture is another function."""
    compared = compare_logits(dense, sparse, held_out, settings)
    numbers = {name: getattr(settings, name) for name in _NUMBERS}
    if compared["share_of_other_positions"] > (0 if is_exact(**numbers) else _MOST_TIES):
        raise RunFailedError(
            f"upcycle: the mixture's logits differ by {compared['max_logit_difference']:.3g}, expected rounding: "
            f"{sparse.config.model_type} does not compute what {dense.config.model_type} does with these settings"
        )
    return compared


def describe_upcycling(dense: PreTrainedConfig, sparse: PreTrainedConfig, settings: UpcycleSettings) -> str:
    """Return one line on what is made of what.

    Args:
        dense: The dense model's configuration.
        sparse: The mixture's.
        settings: The numbers of experts.
    """
    before, after = (outline(config).num_parameters() for config in (dense, sparse))
    width = dense.intermediate_size // settings.granularity
    experts = 3 * dense.hidden_size * width * dense.num_hidden_layers
    active = after - experts * (settings.n_routed_experts - settings.num_experts_per_tok)
    return (
        f"{dense.model_type} of {before:,} parameters -> {sparse.model_type} of {after:,}: "
        f"{settings.n_routed_experts} experts of width {width} in each of {dense.num_hidden_layers} layers, "
        f"{settings.num_experts_per_tok} per token, {active:,} parameters active per token"
    )


@torch.no_grad()
def compare_logits(
    dense: PreTrainedModel, sparse: PreTrainedModel, held_out: HeldOut, settings: Any
) -> dict[str, float]:
    """Return the largest difference of two models' logits on held-out text, and how often they differ by more.

    Args:
        dense: One model.
        sparse: The other.
        held_out: The text; its first `batch_size` windows are compared.
        settings: Windows: `sequence_length`, `batch_size`.
    """
    tokens = torch.cat([torch.as_tensor(document) for document in held_out.documents]).long()
    windows = tokens.split(settings.sequence_length)[: settings.batch_size]
    differences, largest = [], 0.0
    for window in windows:
        first, second = (model(window[None]).logits.float() for model in (dense, sparse))
        differences.append((first - second).abs().amax(-1).flatten())
        largest = max(largest, first.abs().max().item())
    by_position = torch.cat(differences)
    is_other = ~(by_position <= _MOST_DIFFERENCE.get(dense.dtype, 1e-4) * largest)
    return {
        "max_logit_difference": by_position.max().item(),
        "largest_logit": largest,
        "share_of_other_positions": is_other.double().mean().item(),
        "positions": len(by_position),
    }
