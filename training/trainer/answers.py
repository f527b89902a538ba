"""Held-out conversations as the sft stage scores them, and sampled answers to some of their questions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from deepseek_records.summary import Sample
from deepseek_records.user_text import encode_chat
from deepseek_training.data.conversations import encode_conversation, question_of
from deepseek_training.recipes.sft import SftRecipe
from deepseek_training.trainer.bits_per_byte import BitsPerByte

NUM_SAMPLES = 4


@dataclasses.dataclass(frozen=True)
class HeldOutAnswers:
    """Held-out conversations, whose answers are scored given their questions.

    Attributes:
        name: As it appears in the figures.
        rows: Conversations with ``prompt`` and ``answer``.
        tokenizer: With its chat template.
    """

    name: str
    rows: Sequence[dict[str, str]]
    tokenizer: PreTrainedTokenizerBase

    @torch.no_grad()
    def measure(self, model: Any, recipe: SftRecipe) -> BitsPerByte:
        """Return the bits per byte of the answers, the end token included.

        Args:
            model: The model.
            recipe: Names batch size and length; what does not fit `sequence_length` is cut off.
        """
        tokenizer, was_training = self.tokenizer, model.training
        model.eval()
        encoded = [one for row in self.rows for one in encode_conversation(row, tokenizer, recipe.sequence_length)]
        nats, counts, num_bytes = [], [], 0
        for start in range(0, len(encoded), recipe.batch_size):
            part = encoded[start : start + recipe.batch_size]
            batch = _pad_right([one.input_ids for one in part], tokenizer.pad_token_id or 0)
            batch = {name: value.to(next(model.parameters()).device) for name, value in batch.items()}
            logits, targets = model(**batch).logits[:, :-1].float(), batch["input_ids"][:, 1:]
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            losses = losses.view(targets.shape)
            for losses_of_row, one in zip(losses, part, strict=True):
                is_scored = torch.tensor(one.is_answer[1:], device=losses.device)
                nats.append(float(losses_of_row[: len(is_scored)][is_scored].sum()))
                counts.append(int(is_scored.sum()))
                answers = [number for number, own in zip(one.input_ids, one.is_answer, strict=True) if own]
                num_bytes += len(tokenizer.decode(answers, skip_special_tokens=True).encode())
        model.train(was_training)
        return BitsPerByte.from_windows(nats, counts, num_bytes)

    @torch.no_grad()
    def sample(self, model: Any, recipe: SftRecipe) -> tuple[Sample, ...]:
        """Return sampled answers to a few of the questions, at temperature 0.8 from the recipe's seed."""
        set_seed(recipe.seed)
        model.eval()
        samples = []
        for row in self.rows[:: max(1, len(self.rows) // NUM_SAMPLES)][:NUM_SAMPLES]:
            asked = question_of(row)
            ids = torch.tensor([encode_chat(asked, self.tokenizer, add_generation_prompt=True)], device=model.device)
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=recipe.sample_tokens,
                do_sample=True,
                temperature=0.8,
            )
            answer = self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            samples.append(Sample(prompt=str(asked[-1]["content"]), completion=answer))
        return tuple(samples)


def _pad_right(rows: Sequence[Sequence[int]], filler: int) -> dict[str, torch.Tensor]:
    """Token ids and attention mask, both `[B, S]`."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
