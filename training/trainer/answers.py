"""Held-out conversations as the sft stage scores them, and sampled answers to some of their questions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from deepseek_records.summary import Sample
from deepseek_training.data.conversations import encode_conversation, to_messages
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
        nats, counts, num_bytes = [], [], 0
        for start in range(0, len(self.rows), recipe.batch_size):
            part = self.rows[start : start + recipe.batch_size]
            encoded = [encode_conversation(row, tokenizer, recipe.sequence_length) for row in part]
            batch = tokenizer.pad(
                {"input_ids": [ids for ids, _ in encoded]}, padding_side="right", return_tensors="pt"
            ).to(next(model.parameters()).device)
            logits, targets = model(**batch).logits[:, :-1].float(), batch["input_ids"][:, 1:]
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            losses = losses.view(targets.shape)
            for losses_of_row, (ids, first) in zip(losses, encoded, strict=True):
                nats.append(float(losses_of_row[first - 1 : len(ids) - 1].sum()))
                counts.append(len(ids) - first)
                num_bytes += len(tokenizer.decode(ids[first:], skip_special_tokens=True).encode())
        model.train(was_training)
        return BitsPerByte.from_windows(nats, counts, num_bytes)

    @torch.no_grad()
    def sample(self, model: Any, recipe: SftRecipe) -> tuple[Sample, ...]:
        """Return sampled answers to a few of the questions, at temperature 0.8 from the recipe's seed."""
        set_seed(recipe.seed)
        model.eval()
        samples = []
        for row in self.rows[:: max(1, len(self.rows) // NUM_SAMPLES)][:NUM_SAMPLES]:
            inputs = self.tokenizer.apply_chat_template(
                to_messages(row)["prompt"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
            ).to(model.device)
            output = model.generate(**inputs, max_new_tokens=recipe.sample_tokens, do_sample=True, temperature=0.8)
            answer = self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            samples.append(Sample(prompt=row["prompt"], completion=answer))
        return tuple(samples)
