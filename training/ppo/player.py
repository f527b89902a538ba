"""Plays one batch: completions are sampled, then log-probs of the reference, values and rewards are noted.

`CorrectedPPOTrainer` makes a `Player` of its own parts; its training steps and its evaluation both play with it.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, TrainerState
from trl.models.utils import unwrap_model_for_generation

from deepseek_training.ppo.forward import (
    NO_TOKEN,
    response_logprobs,
    response_values,
    reward_model_scores,
    router_logits_off,
)
from deepseek_training.ppo.reward_adapter import RewardAdapter, RewardError
from deepseek_training.ppo.rollout import Rollout, mask_beyond_end, sample
from deepseek_training.ppo.settings import PPOConfig
from deepseek_training.ppo.stopwatch import Stopwatch
from deepseek_training.trainer.whole_weights import whole_weights


@dataclasses.dataclass(eq=False, kw_only=True)
class Player:
    """The parts of a trainer that take part in a rollout.

    Attributes:
        args: TRL's settings.
        accelerator: Knows the device, the processes and the precision.
        model: Policy and value model, wrapped by the accelerator.
        ref_model: The reference; None where it is the policy without its adapter.
        reward_model: A `RewardAdapter`, or a reward model as TRL takes it.
        tokenizer: Of the policy.
        stop_token_id: Where a completion ends; None: only at the longest length.
        prompt_column: The data column that the reward reads as prompts; where it is absent they are decoded.
        state: The trainer's state, passed to the reward and named in its errors.
        adapter_off: Turns the policy's adapter off for a while.
        watch: Adds up the seconds of each part.
        metrics: What rewards log during the current step.
        extra_columns: What rewards log per completion.
    """

    args: PPOConfig
    accelerator: Accelerator
    model: nn.Module
    ref_model: nn.Module | None
    reward_model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    stop_token_id: int | None
    prompt_column: str
    state: TrainerState
    adapter_off: Callable[[], AbstractContextManager[None]]
    watch: Stopwatch = dataclasses.field(default_factory=Stopwatch)
    metrics: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    extra_columns: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    _is_whole: bool = dataclasses.field(default=False, init=False)

    @torch.no_grad()
    def play(self, batch: dict[str, Any], *, is_evaluation: bool = False) -> Rollout:
        """Sample completions and note log-probs, values and scores, with every module in evaluation mode.

        Stock samples in training mode (functional dropout, load counters) and outside autocast.

        Args:
            batch: From the data collator.
            is_evaluation: Told to the reward, which then leaves its own state alone.

        Raises:
            RewardError: The reward failed in this process.
        """
        args = self.args
        queries = batch["input_ids"].to(self.accelerator.device)
        context_length = queries.shape[1]
        self.model.eval()
        with self.whole_weights(), self.accelerator.autocast():
            with self.watch.time("generation"), self._unwrapped_for_generation() as (unwrapped, config):
                query_responses, logprobs = sample(
                    unwrapped.policy, queries, config, args.local_rollout_forward_batch_size, self.stop_token_id
                )
            with self.watch.time("logps"):
                if self._rounds():
                    logprobs = self._own_logprobs(query_responses, context_length)
                ref_logprobs, values = self._reference_and_values(query_responses, context_length)
        self.model.train()
        responses = query_responses[:, context_length:]
        masked = mask_beyond_end(responses, logprobs.float(), ref_logprobs, values)
        end = self.tokenizer.eos_token_id if self.stop_token_id is None else self.stop_token_id
        has_eos = (responses == end).any(1)
        with self.watch.time("reward"):
            scores, completions = self._score(batch, query_responses, context_length, is_evaluation)
        if args.missing_eos_penalty is not None:
            scores = torch.where(has_eos, scores, scores - args.missing_eos_penalty)
        return Rollout(
            query_responses, context_length, scores=scores, has_eos=has_eos, completions=completions, **masked
        )

    @contextlib.contextmanager
    def figures_kept(self) -> Iterator[None]:
        """Keep what is measured inside, such as an evaluation, out of the next step's log."""
        kept = self.metrics, self.watch
        self.metrics, self.watch = {}, Stopwatch()
        try:
            yield
        finally:
            self.metrics, self.watch = kept

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Hold all weights in this process, however often it plays inside; every process has to come here."""
        if self._is_whole:
            yield
            return
        self._is_whole = True
        try:
            with whole_weights(self.model, self.accelerator):
                yield
        finally:
            self._is_whole = False

    def log_metric(self, name: str, value: float) -> None:
        """What rewards receive as ``log_metric``; the next log averages the values over the processes."""
        self.metrics.setdefault(name, []).append(value)

    @contextlib.contextmanager
    def _unwrapped_for_generation(self) -> Iterator[tuple[nn.Module, GenerationConfig]]:
        settings = {
            "max_new_tokens": self.args.response_length,
            "temperature": self.args.temperature + 1e-7,
            "top_k": 0,
            "top_p": 1.0,
            "do_sample": True,
        }
        config = GenerationConfig(**settings, pad_token_id=self.tokenizer.pad_token_id)
        with (
            unwrap_model_for_generation(
                self.model,
                self.accelerator,
                gather_deepspeed3_params=False,  # `whole_weights` has
                generation_kwargs=settings,
            ) as unwrapped,
            router_logits_off(unwrapped.policy),
        ):
            yield unwrapped, config

    def _rounds(self) -> bool:
        """Whether the policy computes in 16 bits, where generation with a cache rounds otherwise than an update."""
        policy = self.accelerator.unwrap_model(self.model).policy
        is_half = any(p.dtype in (torch.bfloat16, torch.float16) for p in policy.parameters())
        return is_half or self.accelerator.mixed_precision != "no"

    def _own_logprobs(self, query_responses: torch.Tensor, context_length: int) -> torch.Tensor:
        """[B, T] of the policy, by the passes of the update, so that its first ratio is 1."""
        policy, temperature = self.accelerator.unwrap_model(self.model).policy, self.args.temperature
        parts = query_responses.split(self.args.local_rollout_forward_batch_size)
        return torch.cat([response_logprobs(policy, part, context_length, temperature) for part in parts])

    def _reference_and_values(
        self, query_responses: torch.Tensor, context_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T] each, in slices of the rollout batch size."""
        unwrapped, temperature = self.accelerator.unwrap_model(self.model), self.args.temperature
        ref_logprobs, values = [], []
        for part in query_responses.split(self.args.local_rollout_forward_batch_size):
            if self.ref_model is None:
                with self.adapter_off():
                    ref_logprobs.append(response_logprobs(unwrapped.policy, part, context_length, temperature))
            else:
                ref_logprobs.append(response_logprobs(self.ref_model, part, context_length, temperature))
            values.append(response_values(unwrapped.value_model, part, context_length))
        return torch.cat(ref_logprobs), torch.cat(values)

    def _score(
        self, batch: dict[str, Any], query_responses: torch.Tensor, context_length: int, is_evaluation: bool
    ) -> tuple[torch.Tensor, list[str]]:
        """[B] scores and the completions as text; the reward is called once for the whole batch."""
        ids = [row[row != NO_TOKEN].tolist() for row in query_responses[:, context_length:]]
        step = f"step {self.state.global_step + 1}"
        if not isinstance(self.reward_model, RewardAdapter):
            scores = reward_model_scores(self.reward_model, query_responses, context_length)
            if not torch.isfinite(scores).all():
                raise RewardError(f"{step}: the reward model's scores are not finite")
            return scores.float(), self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        columns = {key: value for key, value in batch.items() if key not in ("input_ids", self.prompt_column)}
        prompts = batch.get(self.prompt_column) or self.tokenizer.batch_decode(
            [row[row != NO_TOKEN].tolist() for row in batch["input_ids"]], skip_special_tokens=True
        )
        extras = {
            "trainer_state": self.state,
            "log_metric": self.log_metric,
            "log_extra": self.extra_columns.__setitem__,
            "is_evaluation": is_evaluation,
        }
        try:
            scores, completions = self.reward_model.score(ids, prompts, **columns, **extras)
        except Exception as error:  # whatever a user's reward may raise, the run is kept
            text = " ".join(str(error).split())
            raise RewardError(f"{step}: {type(error).__name__}: {text}") from error
        return scores.to(self.accelerator.device), completions
