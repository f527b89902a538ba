"""PPO as TRL had it, with its known defects mended, on any TRL. `foundation.py` puts the parts together.

Settings, formulas and metrics' names are those of TRL 1.12's `PPOTrainer`, which "stock" means below; what is done
otherwise says why, and `docs/aligning_with_ppo.md` has the table, stock against ours. Rewards are callables
(`deepseek_training.rewards`), the very ones GRPO and RLOO take. With settings under which the stock class is right,
both trace the same losses; a test holds that.
"""

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from deepseek_records.activation_checkpointing import enable_checkpointing
from deepseek_records.stop_signals import undeferred
from deepseek_training.ppo.checkpoint import PPOCheckpoints, last_checkpoint
from deepseek_training.ppo.evaluation import evaluate_prompts, mean_metrics, show_samples
from deepseek_training.ppo.foundation import PPOFoundation
from deepseek_training.ppo.metrics import count_eos, mean_by_name, speed_metrics, step_means
from deepseek_training.ppo.player import Player
from deepseek_training.ppo.reward_adapter import (
    RewardAdapter,
    RewardError,
    load_reward_state,
    raise_together,
    reward_state,
)
from deepseek_training.ppo.rollout import Rollout
from deepseek_training.ppo.settings import PPOConfig
from deepseek_training.ppo.setup import (
    check_prompts,
    check_settings,
    check_value_model,
)
from deepseek_training.ppo.stopwatch import Stopwatch
from deepseek_training.ppo.update import DEVIATION, Targets, compute_targets, micro_batch_loss
from deepseek_training.ppo.value import value_model_for
from deepseek_training.trainer.divergence import refuse_divergence
from modeling_deepseek.training_pass import set_accumulation_steps

_SEED_STEP = 1_000_003  # a prime, so that seeds of different updates and processes do not meet


class CorrectedPPOTrainer(PPOFoundation):
    """PPO that clips, steps, resumes, evaluates and saves as its settings say.

    Args:
        args: TRL's settings; their names and meanings are TRL's.
        processing_class: The tokenizer; it needs a pad token, which may equal eos.
        model: The policy.
        reward: A callable (see `deepseek_training.rewards`), or a reward model as TRL takes it.
        train_dataset: Rows with ``input_ids``; all other columns go to the reward.
        value_model: A sequence classifier with one label; None gives a LoRA policy one that shares its frozen weights.
        ref_model: The reference; None copies the policy, or with LoRA turns the adapter off.
        eval_dataset: Held-out rows, for `evaluate`.
        callbacks: More callbacks.
        peft_config: Makes the policy a LoRA one.
        prompt_column: The column passed to the reward as its prompts; without it the prompts are decoded.
        num_eval_samples: Completions of each held-out prompt in `evaluate`, whose mean counts.

    Attributes:
        last_evaluation: What the last `evaluate` measured, one list per column, one value per prompt.

    Raises:
        ValueError: A setting with which training could not begin or never end.
    """

    def __init__(
        self,
        *,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        reward: Callable[..., list[float | None]] | nn.Module,
        train_dataset: Dataset,
        value_model: nn.Module | None = None,
        ref_model: PreTrainedModel | None = None,
        eval_dataset: Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
        optimizers: tuple[Any, ...] = (None, None),
        prompt_column: str = "prompt",
        num_eval_samples: int = 1,
    ) -> None:
        check_settings(args, processing_class, model.config)
        check_prompts(args, model.config, train_dataset, eval_dataset)
        if value_model is None:
            value_model = value_model_for(model, peft_config)
        check_value_model(value_model, model.config)
        if not isinstance(reward, nn.Module):
            reward = RewardAdapter(reward, processing_class)
        super().__init__(
            args=args,
            processing_class=processing_class,
            model=model,
            ref_model=ref_model,
            reward_model=reward,
            train_dataset=train_dataset,
            value_model=value_model,
            eval_dataset=eval_dataset,
            optimizers=optimizers,
            callbacks=callbacks,
            peft_config=peft_config,
        )
        self.num_eval_samples = num_eval_samples
        self.last_evaluation: dict[str, list[Any]] = {}
        self.player = Player(
            args=args,
            accelerator=self.accelerator,
            model=self.model,
            ref_model=self.ref_model,
            reward_model=self.reward_model,
            tokenizer=processing_class,
            stop_token_id=self.stop_token_id,
            prompt_column=prompt_column,
            state=self.state,
            adapter_off=self.null_ref_context,
        )
        self.checkpoints = PPOCheckpoints(
            args, self.accelerator, model=self.model, ref_model=self.ref_model, reward_model=self.reward_model
        )
        if args.gradient_checkpointing:  # stock: the setting is read and never applied
            for module in (self.policy_model, self.value_model):
                enable_checkpointing(module, args.gradient_checkpointing_kwargs)
                if isinstance(module, PeftModel):  # or a reentrant checkpoint finds nothing that needs a gradient
                    module.enable_input_require_grads()

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Train to the end, from the start or from a checkpoint.

        Stock takes no checkpoint, never evaluates, and rolls out in training mode.

        Args:
            resume_from_checkpoint: A folder, or True for the newest whole one in `output_dir`.

        Raises:
            ValueError: There is no such checkpoint, or it does not fit.
            RewardError: A reward raised, or returned scores that are missing, not finite or miscounted.
        """
        args = self.args
        self._begin(resume_from_checkpoint)
        started = time.perf_counter()
        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        self._tell_routers(max(1, args.gradient_accumulation_steps // args.num_mini_batches))
        while self.state.global_step < args.num_total_batches and not self.control.should_training_stop:
            self._train_step(self.state.global_step + 1)
        self._tell_routers(None)
        self.control = self.callback_handler.on_train_end(args, self.state, self.control)
        seconds = time.perf_counter() - started
        losses = [row["loss/policy_avg"] for row in self.state.log_history if "loss/policy_avg" in row]
        return TrainOutput(
            self.state.global_step, float(np.mean(losses)) if losses else 0.0, {"train_runtime": seconds}
        )

    def _begin(self, checkpoint: str | bool | None) -> None:
        """Set the counters as stock does, then overwrite them with the checkpoint's."""
        args = self.args
        self.state.global_step = self.state.episode = 0
        self.state.max_steps = args.num_total_batches
        self.state.num_train_epochs = args.total_episodes / self.train_dataset_len
        for name in ("logging_steps", "eval_steps", "save_steps"):
            value = getattr(args, name)
            if value is not None:
                value = math.ceil(self.state.max_steps * value) if value < 1 else value
                setattr(self.state, name, value)
        if self.is_deepspeed_enabled:
            self.model_wrapped = self.model
        if checkpoint is True:
            checkpoint = last_checkpoint(args.output_dir)
            if checkpoint is None:
                raise ValueError(f"resume_from_checkpoint=True: {args.output_dir} holds no whole checkpoint")
        if checkpoint:
            self.checkpoints.load(checkpoint, self.state, self.optimizer, self.lr_scheduler)
        self.model.train()

    def _tell_routers(self, num_passes: int | None) -> None:
        """Tell our models' routers how many passes make an optimizer step, for the size of their auxiliary losses."""
        set_accumulation_steps(self.model, num_passes)

    def _train_step(self, update: int) -> None:
        args = self.args
        self._seed(update)
        rollout = self._play_or_save(self._batch(update))
        with torch.no_grad():
            targets = compute_targets(rollout, args, self._add_up)
        stats = self._learn(rollout, targets)
        self.state.episode += args.batch_size
        self.state.epoch = self.state.episode / self.train_dataset_len
        self.state.global_step = update
        self._log_step(rollout, targets, stats)
        self.lr_scheduler.step()
        self.control = self.callback_handler.on_step_end(args, self.state, self.control)
        if self.control.should_evaluate and self.eval_dataset is not None:
            self._evaluate_or_save()
        if self.control.should_save:
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(args, self.state, self.control)
        if args.num_sample_generations > 0 and (update - 1) % self.sample_generations_freq == 0:
            self.generate_completions(sampling=True)

    def _play_or_save(self, batch: dict[str, Any]) -> Rollout:
        """Play; if a reward fails in any process, every process saves the last whole update and stops."""
        state = copy.deepcopy(reward_state(self.reward_model))
        rollout, failure = None, None
        try:
            with undeferred():  # nothing has been learned of this batch yet
                rollout = self.player.play(batch)
        except RewardError as error:
            failure = error
        except KeyboardInterrupt:
            load_reward_state(self.reward_model, state)
            raise
        try:
            raise_together(failure)
        except RewardError:
            load_reward_state(self.reward_model, state)  # parts called before the one that failed have moved on
            self._save_checkpoint(self.model, trial=None)
            raise
        return rollout

    def _evaluate_or_save(self) -> None:
        try:
            self.evaluate()
        except RewardError:
            self._save_checkpoint(self.model, trial=None)
            raise

    def _seed(self, update: int) -> None:
        """Make an update's randomness depend on nothing but seed, process and number, so that resuming is exact."""
        torch.manual_seed(self.local_seed + _SEED_STEP * update)
        np.random.seed((self.local_seed + _SEED_STEP * update) % 2**32)

    def _batch(self, update: int) -> dict[str, Any]:
        """This process's prompts of an update; each pass over the data has its own order."""
        args = self.args
        per_epoch = self.train_dataset_len // args.batch_size
        epoch, position = divmod(update - 1, per_epoch)
        order = torch.randperm(self.train_dataset_len, generator=torch.Generator().manual_seed(args.seed + epoch))
        start = position * args.batch_size + self.accelerator.process_index * args.local_batch_size
        rows = self.train_dataset.select(order[start : start + args.local_batch_size].tolist())
        return self.data_collator(list(rows))

    def _learn(self, rollout: Rollout, targets: Targets) -> dict[str, torch.Tensor]:
        """Take the optimizer steps of one batch; return `STATS`, one value a mini-batch, and the gradient's norm.

        Stock steps once per `gradient_accumulation_steps` micro-batches, however many make a mini-batch; steps after
        each of them when the data loader is at its end; never clips.
        """
        args = self.args
        logged: dict[str, list[torch.Tensor]] = {}
        with self.player.watch.time("update"):
            for _ in range(args.num_ppo_epochs):
                order = torch.from_numpy(np.random.permutation(args.local_batch_size)).to(self.accelerator.device)
                for mini_batch in order.split(args.local_mini_batch_size):
                    for name, value in self._learn_mini_batch(rollout, targets, mini_batch).items():
                        logged.setdefault(name, []).append(value)
        return {name: torch.stack(values) for name, values in logged.items()}

    def _learn_mini_batch(
        self, rollout: Rollout, targets: Targets, mini_batch: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Take one optimizer step; means are over the mini-batch's tokens in all processes."""
        args, accelerator = self.args, self.accelerator
        masks = (rollout.padding_mask[mini_batch], rollout.padding_mask_p1[mini_batch])
        counts = torch.stack(
            [*((~mask).sum() for mask in masks), torch.tensor(len(mini_batch), device=masks[0].device)]
        )
        # DDP takes the mean of the gradients, so each process divides by the mean of the counts
        totals = accelerator.reduce(counts.float(), reduction="mean")
        micro_batches = mini_batch.split(args.per_device_train_batch_size)
        sums: dict[str, torch.Tensor] = {}
        for rows in micro_batches:
            with accelerator.accumulate(self.model):
                loss, stats = micro_batch_loss(self.model, rollout, targets, rows, totals, args)
                # accelerate divides by the number of micro-batches; the shares already add up to the mean
                accelerator.backward(loss * len(micro_batches))
                if accelerator.sync_gradients and args.max_grad_norm:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
                    stats["grad_norm"] = torch.as_tensor(norm, device=totals.device).detach()  # DeepSpeed: a float
                self.optimizer.step()
                self.optimizer.zero_grad()
            deviation = torch.maximum(stats.pop(DEVIATION), sums.get(DEVIATION, totals.new_zeros(())))
            for name, value in stats.items():
                sums[name] = sums.get(name, 0.0) + value
            sums[DEVIATION] = deviation
        # Stock tells no callback of its steps; ExpertBalanceCallback moves its biases here
        self.control = self.callback_handler.on_optimizer_step(args, self.state, self.control)
        return sums

    def _add_up(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the processes."""
        return self.accelerator.reduce(values, reduction="sum")

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Complete each held-out prompt and return the mean reward, its parts and the KL, with errors over prompts.

        Each prompt is completed `num_eval_samples` times and counts once, with its mean.
        Stock has no evaluation loop and its loader drops the last partial batch. The randomness is the same at every
        call, so that evaluations differ by the policy alone, and training does not notice.

        Args:
            eval_dataset: Other rows than the trainer's.
            ignore_keys: Not used; for `Trainer`'s signature.
            metric_key_prefix: Put before each name.

        Raises:
            ValueError: There are no held-out rows.
            RewardError: The reward failed.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("eval_dataset: none was given, neither to the trainer nor to evaluate()")
        self.last_evaluation = self.complete(dataset)
        metrics = mean_metrics(self.last_evaluation, metric_key_prefix)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def generate_completions(self, sampling: bool = False) -> None:
        """Print held-out prompts with completions and scores, `num_sample_generations` times in a training.

        Stock reads its loader, which drops the last partial batch, and tells padding by token ids.

        Args:
            sampling: Take the first batch only.
        """
        if self.eval_dataset is None:
            return
        count = min(self.args.per_device_eval_batch_size, len(self.eval_dataset)) if sampling else None
        dataset = self.eval_dataset if count is None else self.eval_dataset.select(range(count))
        columns = self.complete(dataset)
        if self.accelerator.is_main_process:
            show_samples(self.processing_class.batch_decode(list(dataset["input_ids"])), columns, self.args.report_to)

    def complete(self, dataset: Dataset) -> dict[str, list[Any]]:
        """Complete and score held-out prompts; the next step's log holds nothing of it.

        Args:
            dataset: The prompts.
        """
        with self.player.figures_kept(), self.player.whole_weights(), undeferred():
            return evaluate_prompts(
                self.player, dataset, self.data_collator, num_samples=self.num_eval_samples, seed=self.local_seed
            )

    def _log_step(self, rollout: Rollout, targets: Targets, stats: dict[str, torch.Tensor]) -> None:
        """Log under TRL's names, and the gradient's norm, the reward's parts and the share of time beside them."""
        own = {name: float(value) for name, value in step_means(rollout, targets, stats).items()}
        own.update({name: float(np.mean(values)) for name, values in self.player.metrics.items()})
        metrics = mean_by_name(gather_object([own]))
        ratios = self.accelerator.gather(stats["ratio"])
        metrics["val/ratio_var"] = ratios.var().item() if len(ratios) > 1 else 0.0
        metrics["val/num_eos_tokens"] = sum(gather_object([count_eos(rollout, self.processing_class)]))
        metrics.update(speed_metrics(self.player.watch, rollout, self.args))
        metrics["lr"] = self.lr_scheduler.get_last_lr()[0]
        metrics["episode"] = self.state.episode
        self.player.metrics.clear()
        self.player.watch = Stopwatch()
        self.log(metrics)
        figures = {name: value for name, value in metrics.items() if name.startswith("loss/") or name == "grad_norm"}
        refuse_divergence(self.model, self.state.global_step, self.args.learning_rate, figures)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save what `Trainer` saves, then the value model and the reward's state (stock loses both).

        The older checkpoints are deleted when the new one is whole; `Trainer` deletes them before.
        """
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            Trainer._save_checkpoint(self, model, trial)
        finally:
            self.args.save_total_limit = limit
        self.checkpoints.finish(self.state)
