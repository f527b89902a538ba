"""How PPO plays one batch: completions sampled, reference, values and rewards noted.

Called by `deepseek_training.ppo.trainer` and `ppo_evaluation`, with the trainer.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import GenerationConfig
from trl.experimental.utils import get_reward
from trl.models.utils import unwrap_model_for_generation

from deepseek_training.ppo.forward import NO_TOKEN, response_logprobs, response_values, router_logits_off
from deepseek_training.ppo.rollout import RewardAdapter, Rollout, mask_beyond_end, sample

if TYPE_CHECKING:
    from deepseek_training.ppo.trainer import CorrectedPPOTrainer


class RewardError(RuntimeError):
    """A reward failed in the middle of a run; a checkpoint of the last whole update has been written."""


def raise_together(failure: RewardError | None) -> None:
    """Raise in every process what failed in any, so that none waits for another for ever.

    Args:
        failure: This process's, if it had one.

    Raises:
        RewardError: The first process's failure.
    """
    failures = [text for text in gather_object([None if failure is None else str(failure)]) if text is not None]
    if failures:
        raise RewardError(failures[0]) from failure


@torch.no_grad()
def play(trainer: "CorrectedPPOTrainer", batch: dict[str, Any], *, is_evaluation: bool = False) -> Rollout:
    """Sample completions and note logps, values and scores, with every module in evaluation mode.

    Stock samples in training mode (functional dropout, load counters) and outside autocast.

    Args:
        trainer: Whose policy, reference, value model and reward take part.
        batch: From the data collator.
        is_evaluation: Told to the reward, which then leaves its own state alone.

    Raises:
        RewardError: The reward failed in this process.
    """
    args, device = trainer.args, trainer.accelerator.device
    queries = batch["input_ids"].to(device)
    context_length = queries.shape[1]
    trainer.model.eval()
    with trainer.accelerator.autocast():
        with trainer.watch.time("generation"), _unwrapped_for_generation(trainer) as (unwrapped, config):
            query_responses, logprobs = sample(
                unwrapped.policy, queries, config, args.local_rollout_forward_batch_size, trainer.stop_token_id
            )
        with trainer.watch.time("logps"):
            ref_logprobs, values = _reference_and_values(trainer, query_responses, context_length)
    trainer.model.train()
    masked = mask_beyond_end(query_responses[:, context_length:], logprobs.float(), ref_logprobs, values)
    responses = query_responses[:, context_length:]
    end = trainer.processing_class.eos_token_id if trainer.stop_token_id is None else trainer.stop_token_id
    has_eos = (responses == end).any(1)
    with trainer.watch.time("reward"):
        scores, completions = _score(trainer, batch, query_responses, context_length, is_evaluation)
    if args.missing_eos_penalty is not None:
        scores = torch.where(has_eos, scores, scores - args.missing_eos_penalty)
    return Rollout(query_responses, context_length, scores=scores, has_eos=has_eos, completions=completions, **masked)


@contextlib.contextmanager
def _unwrapped_for_generation(trainer: "CorrectedPPOTrainer") -> Iterator[tuple[nn.Module, GenerationConfig]]:
    settings = {
        "max_new_tokens": trainer.args.response_length,
        "temperature": trainer.args.temperature + 1e-7,
        "top_k": 0,
        "top_p": 1.0,
        "do_sample": True,
    }
    config = GenerationConfig(**settings, pad_token_id=trainer.processing_class.pad_token_id)
    with (
        unwrap_model_for_generation(
            trainer.model,
            trainer.accelerator,
            gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
            generation_kwargs=settings,
        ) as unwrapped,
        router_logits_off(unwrapped.policy),
    ):
        yield unwrapped, config


def _reference_and_values(
    trainer: "CorrectedPPOTrainer", query_responses: torch.Tensor, context_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] each, in slices of the rollout batch size."""
    unwrapped, temperature = trainer.accelerator.unwrap_model(trainer.model), trainer.args.temperature
    ref_logprobs, values = [], []
    for part in query_responses.split(trainer.args.local_rollout_forward_batch_size):
        if trainer.ref_model is None:
            with trainer.null_ref_context():
                ref_logprobs.append(response_logprobs(unwrapped.policy, part, context_length, temperature))
        else:
            ref_logprobs.append(response_logprobs(trainer.ref_model, part, context_length, temperature))
        values.append(response_values(unwrapped.value_model, part, context_length))
    return torch.cat(ref_logprobs), torch.cat(values)


def _score(
    trainer: "CorrectedPPOTrainer",
    batch: dict[str, Any],
    query_responses: torch.Tensor,
    context_length: int,
    is_evaluation: bool,
) -> tuple[torch.Tensor, list[str]]:
    """[B] scores and the completions as text; the reward is called once for the whole batch."""
    device = trainer.accelerator.device
    ids = [row[row != NO_TOKEN].tolist() for row in query_responses[:, context_length:]]
    if not isinstance(trainer.reward_model, RewardAdapter):
        _, scores, _ = get_reward(trainer.reward_model, query_responses, NO_TOKEN, context_length)
        if not torch.isfinite(scores).all():
            raise RewardError(f"step {trainer.state.global_step + 1}: the reward model's scores are not finite")
        return scores.float(), trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    columns = {key: value for key, value in batch.items() if key not in ("input_ids", trainer.prompt_column)}
    prompts = batch.get(trainer.prompt_column) or trainer.processing_class.batch_decode(
        [row[row != NO_TOKEN].tolist() for row in batch["input_ids"]], skip_special_tokens=True
    )
    extras = {
        "trainer_state": trainer.state,
        "log_metric": trainer.log_metric,
        "log_extra": trainer.extra_columns.__setitem__,
        "is_evaluation": is_evaluation,
    }
    try:
        scores, completions = trainer.reward_model.score(ids, prompts, **columns, **extras)
    except Exception as error:  # whatever a user's reward may raise, the run is kept
        text = " ".join(str(error).split())
        raise RewardError(f"step {trainer.state.global_step + 1}: {type(error).__name__}: {text}") from error
    return scores.to(device), completions
