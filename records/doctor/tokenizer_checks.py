"""Checks of the tokenizer beside the model, and of its chat template."""

import math

import torch
from jinja2 import TemplateError

from deepseek_records.doctor.subject import Finding, NotCheckedError, Subject

_TEXT = (
    "The committee met in the morning and again in the afternoon. It was said that the river had risen during the "
    "night, and that the old bridge would not be safe before the spring. Nobody knew who had closed the gate."
)
# Above the loss of a model that has learned nothing by as much as a mixed-up vocabulary costs a trained one.
_MARGIN = 1.0
_QUESTION = {"role": "user", "content": "What is two and two?"}
_ANSWER = {"role": "assistant", "content": "It is four."}


def pad_equals_end(subject: Subject) -> Finding | None:
    """Where padding is masked by its id, the end token is masked too and never learned."""
    tokenizer = subject.tokenizer
    end = tokenizer.eos_token_id
    if end is None or tokenizer.pad_token_id != end:
        return None
    return Finding(
        f"padding and end are one token, {tokenizer.eos_token!r} ({end}): the model does not learn to stop",
        "give the tokenizer a padding token of its own, for example an unused one of its vocabulary",
    )


def mixed_up_tokenizer(subject: Subject) -> Finding | None:
    """Ids the model has no row for, another end token than the model's, or text worse than chance."""
    tokenizer, config = subject.tokenizer, subject.config.get_text_config()
    cure = "put the model's own tokenizer files beside it"
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        return Finding(f"the tokenizer has ids up to {largest}, the model {config.vocab_size} rows", cure)
    for name in ("bos_token_id", "eos_token_id"):
        known, own = getattr(config, name, None), getattr(tokenizer, name)
        known = known if isinstance(known, list) else [known]
        if own is not None and known != [None] and own not in known:
            shown = ", ".join(map(str, known))
            return Finding(f"{name} is {own} for the tokenizer and {shown} for the model", cure)
    loss, chance = _loss_on_text(subject), math.log(config.vocab_size)
    if loss > chance + _MARGIN:
        return Finding(f"plain text costs {loss:.1f} nats per token, {chance:.1f} are chance", cure)
    return None


@torch.no_grad()
def _loss_on_text(subject: Subject) -> float:
    tokens = torch.tensor([subject.tokenizer(_TEXT)["input_ids"]])
    tokens = tokens[:, : getattr(subject.config.get_text_config(), "max_position_embeddings", tokens.shape[1])]
    return subject.model(input_ids=tokens, labels=tokens, use_cache=False).loss.item()


def untrainable_template(subject: Subject) -> Finding | None:
    """Answers are told from questions by a common beginning; a template that changes it masks the wrong tokens."""
    tokenizer = subject.tokenizer
    template = tokenizer.chat_template
    if not template:
        raise NotCheckedError("the tokenizer has no chat template")
    if "{% generation" in str(template) or "{%- generation" in str(template):
        return None
    cure = "mark the answer with {% generation %} in the template, or let both begin alike"
    try:
        asked = tokenizer.apply_chat_template([_QUESTION], add_generation_prompt=True, tokenize=False)
        answered = tokenizer.apply_chat_template([_QUESTION, _ANSWER], tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        return Finding(f"the chat template fails on a question and its answer ({reason})", "mend the template")
    if not answered.startswith(asked):
        return Finding("the chat template puts a question otherwise once it is answered", cure)
    end = answered[len(asked) :].partition(_ANSWER["content"])
    if not end[1]:
        return Finding("the chat template leaves the answer out", cure)
    if not end[2].strip():
        return Finding(
            "the chat template puts nothing behind an answer: the model does not learn to stop",
            "end the assistant's turn with {{ eos_token }}",
        )
    return None
