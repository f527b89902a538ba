"""The forward passes of PPO: logits, logprobs and values of a completion's tokens, and nothing of its prompt's.

Called by `deepseek_training.ppo.trainer` and its `update`. TRL computes the logits of the prompt too, fills a cache
that is never read, keeps every layer's hidden states of the policy, and carries the padding in front of prompts along.
Shapes: B rows, P prompt columns, T completion columns, V vocabulary.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from trl.trainer.utils import selective_log_softmax

from deepseek_records.activation_checkpointing import disable_checkpointing, enable_checkpointing, uses_checkpointing

NO_TOKEN = -1  # padding: an id no tokenizer has


class PolicyAndValue(nn.Module):
    """Policy and value model as the one module that accelerate wraps.

    Args:
        policy: A causal language model.
        value_model: A sequence classifier with one label.
    """

    def __init__(self, policy: nn.Module, value_model: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        self.value_model = value_model
        self.config = policy.config
        self.is_gradient_checkpointing = uses_checkpointing(policy)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute the policy's activations again, after a generation.

        Args:
            kwargs: As transformers takes them.
        """
        enable_checkpointing(self.policy, kwargs.get("gradient_checkpointing_kwargs"))
        self.is_gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep the policy's activations, during a generation."""
        disable_checkpointing(self.policy)
        self.is_gradient_checkpointing = False

    def forward(
        self, query_responses: torch.Tensor, context_length: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return logits [B, T, V], values [B, T], and the weighted auxiliary loss of a policy that computes one.

        Args:
            query_responses: [B, P + T] token ids, padding is `NO_TOKEN`.
            context_length: P.
        """
        values = response_values(self.value_model, query_responses, context_length)
        output, logits = _policy_output(self.policy, query_responses, context_length)
        aux_loss = output.get("aux_loss")
        # Our own model attaches its balancing terms inside the layers and reports a number without gradient.
        if aux_loss is None or not aux_loss.requires_grad:
            return logits, values, None
        return logits, values, aux_loss * self.policy.config.router_aux_loss_coef


@contextlib.contextmanager
def router_logits_off(policy: nn.Module) -> Iterator[None]:
    """While a policy generates, keep it from computing its auxiliary loss.

    transformers (5.23) computes it in each step of the generation too, where the mask no longer fits and it raises.

    Args:
        policy: Any; most have no such setting.
    """
    is_on = getattr(policy.config, "output_router_logits", False)
    if is_on:
        policy.config.output_router_logits = False
    try:
        yield
    finally:
        if is_on:
            policy.config.output_router_logits = True


def response_logprobs(
    model: nn.Module, query_responses: torch.Tensor, context_length: int, temperature: float
) -> torch.Tensor:
    """Return the model's logprobs of the completion tokens, [B, T]; padding has to be masked by the caller.

    Args:
        model: A causal language model.
        query_responses: [B, P + T].
        context_length: P.
        temperature: Divides the logits.
    """
    logits = _policy_output(model, query_responses, context_length)[1].float()
    return selective_log_softmax(logits / (temperature + 1e-7), query_responses[:, context_length:].clamp(min=0))


def response_values(value_model: nn.Module, query_responses: torch.Tensor, context_length: int) -> torch.Tensor:
    """Return the value model's estimate before each completion token, [B, T].

    Args:
        value_model: A sequence classifier with one label.
        query_responses: [B, P + T].
        context_length: P.
    """
    backbone = getattr(value_model, value_model.base_model_prefix)
    inputs = _model_inputs(query_responses)
    hidden_states = backbone(**inputs, output_hidden_states=True).hidden_states[-1]
    count = query_responses.shape[1] - context_length + 1
    return value_model.score(hidden_states[:, -count:-1]).squeeze(-1).float()


def reward_model_scores(reward_model: nn.Module, query_responses: torch.Tensor, context_length: int) -> torch.Tensor:
    """Return [B] scores of a reward model as TRL takes it, read at each completion's last token.

    Args:
        reward_model: A sequence classifier with one label, or a module of that form.
        query_responses: [B, P + T].
        context_length: P.
    """
    mask = query_responses != NO_TOKEN
    hidden_states = getattr(reward_model, reward_model.base_model_prefix)(
        input_ids=query_responses.masked_fill(~mask, 0),
        attention_mask=mask,
        position_ids=mask.cumsum(1) - mask.long(),
        return_dict=True,
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states[-1]
    last = context_length + mask[:, context_length:].sum(1) - 1
    return reward_model.score(hidden_states)[torch.arange(len(mask), device=mask.device), last].squeeze(-1)


def _policy_output(model: nn.Module, query_responses: torch.Tensor, context_length: int) -> tuple[Any, ...]:
    """The model's output, and its logits before each completion token, [B, T, V]."""
    count = query_responses.shape[1] - context_length + 1
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept = {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    output = model(**_model_inputs(query_responses), **kept)
    return output, output.logits[:, -count:-1]


def _model_inputs(query_responses: torch.Tensor) -> dict[str, torch.Tensor | bool]:
    """Without the columns in front that are padding in every row."""
    mask = query_responses != NO_TOKEN
    start = int(mask.any(0).int().argmax())
    mask, ids = mask[:, start:], query_responses[:, start:]
    return {
        "input_ids": ids.masked_fill(~mask, 0),
        "attention_mask": mask,
        "position_ids": mask.cumsum(1) - mask.long(),
        "use_cache": False,
        "return_dict": True,
    }
