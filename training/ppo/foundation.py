"""What PPO's trainer is built of: reference, batch sizes, accelerator, optimizer, callbacks and prepared models.

`CorrectedPPOTrainer` adds the loop. Both stand on TRL's `PPOTrainer` where TRL has one, so that code which asks for
that class finds it, and on transformers' `Trainer` where it has none (TRL 1.13 and later). Of the base they use what
`Trainer` does: optimizer and schedule, logging, callbacks, saving.
"""

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerControl
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import DEFAULT_CALLBACKS, DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import CallbackHandler, ExportableState, PrinterCallback

from deepseek_training.ppo.checkpoint import PPOState
from deepseek_training.ppo.forward import PolicyAndValue
from deepseek_training.ppo.rollout import PromptCollator
from deepseek_training.ppo.settings import PPOConfig
from deepseek_training.ppo.setup import deepspeed_plugin, disable_dropout, set_batch_sizes
from deepseek_training.trainer.whole_weights import is_split, whole_weights

try:
    from trl.experimental.ppo import PPOTrainer as StockTrainer
except ImportError:  # TRL 1.13 and later
    StockTrainer = Trainer


class PPOFoundation(StockTrainer):
    """The parts of a PPO training, put together; no constructor of a base class runs.

    Args:
        args: The settings; the batch sizes are filled in.
        processing_class: The tokenizer.
        model: The policy.
        reward_model: Gives the scores.
        value_model: A sequence classifier with one label.
        train_dataset: The prompts.
        ref_model: The reference; None copies the policy, or with LoRA turns the adapter off.
        eval_dataset: Held-out prompts.
        optimizers: Optimizer and schedule, in place of those of the settings.
        callbacks: More callbacks.
        peft_config: Makes the policy a LoRA one.
    """

    def __init__(
        self,
        *,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        reward_model: nn.Module,
        value_model: nn.Module,
        train_dataset: Dataset,
        ref_model: PreTrainedModel | None,
        eval_dataset: Dataset | None,
        optimizers: tuple[Any, ...],
        callbacks: list[TrainerCallback] | None,
        peft_config: Any,
    ) -> None:
        self.args = args
        self.processing_class = processing_class
        self.stop_token_id = stop_token_id(args, processing_class)
        model.generation_config.eos_token_id = self.stop_token_id
        self.policy_model = _with_adapter(model, peft_config, args)
        self.is_peft_model = isinstance(self.policy_model, PeftModel)
        self.model_adapter_name, self.ref_adapter_name = args.model_adapter_name, args.ref_adapter_name
        self.ref_model = ref_model
        if ref_model is None and not self.is_peft_model:
            self.ref_model = _frozen_copy(self.policy_model)
        self.reward_model = reward_model
        self.value_model = value_model
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.train_dataset_len = len(train_dataset)
        self.data_collator = PromptCollator()
        self.accelerator = _build_accelerator(args)
        set_batch_sizes(args, self.accelerator.num_processes, self.train_dataset_len)
        self.local_seed = args.seed + self.accelerator.process_index * 100003  # a prime
        if args.num_sample_generations > 0:
            self.sample_generations_freq = max(1, args.num_total_batches // args.num_sample_generations)
        for module in (self.policy_model, self.ref_model, self.value_model, self.reward_model):
            if module is not None:
                disable_dropout(module)
        self.model = PolicyAndValue(self.policy_model, self.value_model)
        self.optimizer, self.lr_scheduler = optimizers
        self.optimizer_cls_and_kwargs = None
        self.create_optimizer_and_scheduler(num_training_steps=args.num_total_batches)
        self._build_trainer_parts(callbacks)
        self._prepare()

    def _build_trainer_parts(self, callbacks: list[TrainerCallback] | None) -> None:
        """Callbacks, state and what else `Trainer`'s own constructor sets and its methods read."""
        args = self.args
        self.callbacks = DEFAULT_CALLBACKS + get_reporting_integration_callbacks(args.report_to) + (callbacks or [])
        self.callback_handler = CallbackHandler(
            self.callbacks, self.model, self.processing_class, self.optimizer, self.lr_scheduler
        )
        self.add_callback(PrinterCallback if args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK)
        self.control = TrainerControl()
        exportable = [*self.callback_handler.callbacks, self.control]
        self.state = PPOState(
            is_local_process_zero=self.is_local_process_zero(),
            is_world_process_zero=self.is_world_process_zero(),
            stateful_callbacks=[part for part in exportable if isinstance(part, ExportableState)],
        )
        self.current_flos = 0
        self.hp_search_backend = None
        self.is_deepspeed_enabled = getattr(self.accelerator.state, "deepspeed_plugin", None) is not None
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None
        self.is_distributed_loading_by_transformers = False
        self.hub_model_id = None
        if args.push_to_hub:
            self.init_hf_repo()
        if args.should_save:
            os.makedirs(args.output_dir, exist_ok=True)

    def _prepare(self) -> None:
        """Hand model and optimizer to the accelerator, and bring the models that are not trained to its device."""
        loader = DataLoader(
            self.train_dataset, batch_size=self.args.local_batch_size, collate_fn=self.data_collator, drop_last=True
        )  # never read; ZeRO takes the batch size from it
        torch.manual_seed(self.args.seed)
        self.model, self.optimizer, _ = self.accelerator.prepare(self.model, self.optimizer, loader)
        torch.manual_seed(self.local_seed)
        for name in ("ref_model", "reward_model"):
            module = getattr(self, name)
            if module is None:
                continue
            if is_split(module):
                from trl.models.utils import prepare_deepspeed

                setattr(self, name, prepare_deepspeed(module, self.accelerator))
            else:
                setattr(self, name, module.to(self.accelerator.device))

    @contextlib.contextmanager
    def null_ref_context(self) -> Iterator[None]:
        """Make the policy the reference for a while: its adapter off, or the reference's in its place."""
        policy = self.accelerator.unwrap_model(self.model).policy
        if self.ref_adapter_name:
            policy.set_adapter(self.ref_adapter_name)
            yield
            policy.set_adapter(self.model_adapter_name or "default")
        elif self.is_peft_model:
            with policy.disable_adapter():
                yield
        else:
            yield

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy alone, also when DDP hides it (stock then saves the wrapper, which fails)."""
        wrapped, is_deepspeed_enabled = self.model, self.is_deepspeed_enabled
        # DeepSpeed's own way of saving would ask its engine, which holds the value model too
        self.model, self.is_deepspeed_enabled = self.accelerator.unwrap_model(wrapped).policy, False
        try:
            with whole_weights(wrapped, self.accelerator):
                Trainer.save_model(self, output_dir, _internal_call)
        finally:
            self.model, self.is_deepspeed_enabled = wrapped, is_deepspeed_enabled


def stop_token_id(args: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that ends a completion; None: only its length does.

    Args:
        args: The settings.
        tokenizer: Of the policy.
    """
    return tokenizer.eos_token_id if args.stop_token == "eos" else args.stop_token_id


def _with_adapter(model: PreTrainedModel, peft_config: Any, args: PPOConfig) -> nn.Module:
    if peft_config is None:
        return model
    if isinstance(model, PeftModel):
        raise ValueError("peft_config: got one beside a model that has an adapter, expected one of the two")
    policy = get_peft_model(model, peft_config)
    if args.bf16 and getattr(policy, "is_loaded_in_4bit", False):
        from trl.experimental.utils import peft_module_casting_to_bf16

        peft_module_casting_to_bf16(policy)
    return policy


def _frozen_copy(policy: nn.Module) -> nn.Module:
    if is_split(policy):
        raise ValueError(
            "ref_model: got None with a policy that ZeRO-3 has split, expected a model, or zero3_init_flag: false"
        )
    return copy.deepcopy(policy).requires_grad_(False).eval()


def _build_accelerator(args: PPOConfig) -> Accelerator:
    """Return an accelerator that obeys the settings.

    Stock builds one without mixed precision, that counts `gradient_accumulation_steps` micro-batches to a step, steps
    early at the data loader's end, and lets DDP wait for experts that saw no token.
    """
    steps = max(1, args.gradient_accumulation_steps // args.num_mini_batches)
    return Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=steps, sync_with_dataloader=False),
        deepspeed_plugin=deepspeed_plugin(args, steps),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
