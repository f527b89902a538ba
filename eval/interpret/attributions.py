"""What in a text drove a prediction or a router's choice: Integrated Gradients on the input embeddings, by Captum.

The baseline is the mean token embedding: at zero an RMSNorm is singular, and the error of completeness stays large
however many steps are taken. The experts chosen are those of the text itself (`held_choices`), with live weights:
where a choice flips between baseline and text, the output jumps and no integral of a gradient can see it.

Axes: S tokens, D hidden, L layers of routed experts.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepseek_eval.interpret.routed_tokens import choice_of, find_layers
from deepseek_eval.interpret.steered_router import held_choices
from deepseek_records.document_tokens import start_of_text
from deepseek_records.user_text import encode_documents_plainly
from modeling_deepseek.families import MoeLayer

_STEPS = (64, 256)
_STEPS_AT_ONCE = 64
MOST_ERROR = 1e-3
Target = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Attribution:
    """What each token added to a figure, over the mean embedding in its place.

    Attributes:
        values: By token.
        output: The figure for the text.
        baseline: The figure where every token is the mean embedding.
        error: Completeness: |sum of values - (output - baseline)| / |output - baseline|.
        num_steps: Of the integral.
    """

    values: tuple[float, ...]
    output: float
    baseline: float
    error: float
    num_steps: int


def require_captum() -> None:
    """Refuse where Captum is not installed.

    Raises:
        ValueError: It is not; the message says what to install.
    """
    try:
        import captum.attr  # noqa: F401
    except ImportError:
        raise ValueError(
            "--text: got no captum, expected it for input attributions: pip install 'deepseek-moe[explain]'"
        ) from None


class Reading:
    """A model reading one text, with the experts that it chose.

    Args:
        model: In evaluation mode.
        token_ids: `[S]` int64.

    Raises:
        ValueError: The model has no head, reads no embeddings in place of tokens, or a router tells no choice.
    """

    def __init__(self, model: PreTrainedModel, token_ids: np.ndarray) -> None:
        self.model, self.layers = model, find_layers(model)
        self.token_ids = torch.from_numpy(token_ids).to(model.device)
        weight = model.get_input_embeddings().weight.detach()
        with torch.no_grad():
            self.embeddings = self._embed(self.token_ids)
            self.mean = self.embeddings.new_tensor(0.0) + self._mean_embedding(weight)
            self.experts, self.weights, logits = self._note_choices()
        self.next_token = int(logits.argmax())

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[S, D]; some families scale what the embedding holds."""
        return self.model.get_input_embeddings()(token_ids)

    def _mean_embedding(self, weight: torch.Tensor) -> torch.Tensor:
        """[D]: of all rows, as the embedding module gives them."""
        total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
        for ids in torch.arange(len(weight), device=weight.device).split(4096):
            total += self._embed(ids).double().sum(0)
        return (total / len(weight)).to(weight.dtype)

    def _note_choices(self) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """Experts and weights by layer, and the logits of the next token."""
        found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def note(number: int) -> Callable[..., None]:
            def hook(router: Any, args: Any, output: Any) -> None:
                choice = choice_of(self.layers[number], output)
                if choice.topk_indices is None or choice.topk_weights is None:
                    raise ValueError(
                        f"--text: got {type(router).__name__}, expected a router that returns weights and experts"
                    )
                found[number] = choice.topk_indices.long(), choice.topk_weights.float()

            return hook

        hooks = [layer.router.register_forward_hook(note(number)) for number, layer in enumerate(self.layers)]
        try:
            logits = self.model(inputs_embeds=self.embeddings.unsqueeze(0), use_cache=False).logits[0, -1]
        except (AttributeError, TypeError) as error:  # of DeepSeek-V4, which routes by token ids, and without a head
            name = type(self.model).__name__
            raise ValueError(
                f"--text: got {name}, expected a language model that reads embeddings in place of tokens ({error})"
            ) from error
        finally:
            for one in hooks:
                one.remove()
        numbers = range(len(found))
        return [found[number][0] for number in numbers], [found[number][1] for number in numbers], logits

    def held(self) -> AbstractContextManager[None]:
        """Return the state in which every router keeps to the experts of the text."""
        return held_choices(self.layers, self.experts, [weights != 0 for weights in self.weights])

    def next_token_target(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return log P of the likeliest next token, `[B]`.

        Args:
            embeddings: `[B, S, D]`.
        """
        logits = self.model(inputs_embeds=embeddings, use_cache=False).logits[:, -1].float()
        return logits.log_softmax(-1)[:, self.next_token]

    def router_target(self, place: int, expert: int, token: int = -1) -> Target:
        """Return a target: by how much a token's router logit of one expert exceeds the mean over experts.

        Args:
            place: Of the layer among those with routed experts.
            expert: The expert's number.
            token: Whose choice.
        """

        def target(embeddings: torch.Tensor) -> torch.Tensor:
            with _captured_logits(self.layers[place]) as logits:
                self.model(inputs_embeds=embeddings, use_cache=False)
            rows = logits[0].reshape(embeddings.shape[0], embeddings.shape[1], -1)[:, token].float()
            return rows[:, expert] - rows.mean(-1)

        return target


class _captured_logits:
    """Gathers a router's logits while it holds."""

    def __init__(self, layer: MoeLayer) -> None:
        self.layer, self.logits = layer, list[torch.Tensor]()

    def __enter__(self) -> list[torch.Tensor]:
        self.hook = self.layer.router.register_forward_hook(
            lambda router, args, output: self.logits.append(output[self.layer.logits_place])
        )
        return self.logits

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


def attribute(reading: Reading, target: Target) -> Attribution:
    """Return each token's part in a figure, with as many steps as completeness needs.

    Args:
        reading: The text.
        target: From `Reading.next_token_target` or `Reading.router_target`.

    Raises:
        ValueError: Captum is not installed.

    Reference:
        Sundararajan, Taly and Yan 2017, arXiv 1703.01365 (Integrated Gradients, completeness).
    """
    require_captum()
    from captum.attr import IntegratedGradients

    inputs = reading.embeddings.unsqueeze(0).detach()
    baseline = reading.mean.expand_as(inputs).contiguous()
    flags = [(one, one.requires_grad) for one in reading.model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with reading.held():
            with torch.no_grad():
                output, start = (float(target(one)) for one in (inputs, baseline))
            for steps in _STEPS:
                parts = IntegratedGradients(target).attribute(
                    inputs, baseline, n_steps=steps, internal_batch_size=_STEPS_AT_ONCE
                )
                values = parts[0].double().sum(-1)
                error = abs(float(values.sum()) - (output - start)) / max(abs(output - start), 1e-9)
                if error < MOST_ERROR:
                    break
    finally:
        for parameter, was in flags:
            parameter.requires_grad_(was)
    return Attribution(tuple(values.tolist()), output, start, error, steps)


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> np.ndarray:
    """Return a text's token ids `[S]` with the begin token in front.

    Args:
        text: What the user asks about.
        tokenizer: The model's.
        max_length: The model's context.

    Raises:
        ValueError: The text is empty, of one token, or longer than the context.
    """
    if not text.strip():
        raise ValueError("--text: got an empty text, expected at least two tokens")
    ids = encode_documents_plainly([text], tokenizer)[0]
    if len(ids) < 2:
        raise ValueError(f"--text: got {text!r}, one token, expected at least two to compare")
    ids = [*start_of_text(tokenizer), *ids]
    if len(ids) > max_length:
        raise ValueError(f"--text: got {len(ids)} tokens, expected at most {max_length}, the model's context")
    return np.array(ids, dtype=np.int64)
