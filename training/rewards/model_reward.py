"""A reward model of one's own: a sequence classifier with one label, as TRL takes it, by path.

Called like the other rewards, by PPO, GRPO, RLOO and inside a `WeightedReward`. It reads text, not the policy's token
ids, so that its tokenizer may be another one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from deepseek_records.loading import load_model, load_tokenizer, resolve_checkpoint
from deepseek_records.user_text import encode, protect, render_chat
from deepseek_training.rewards.words import text_of

_BATCH_SIZE = 16


class ModelReward:
    """The score that a sequence classifier gives to a prompt with its completion.

    Where its tokenizer has a chat template both are put by that; else the completion follows the prompt after a line
    end. What is longer than the model's context loses its beginning.

    Args:
        name_or_path: A checkpoint folder, run folder or Hub id, with its tokenizer.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It has another number of labels than 1, or is not a sequence classifier: the head would be random.
    """

    def __init__(self, name_or_path: str) -> None:
        self.__name__ = "model"
        config = AutoConfig.from_pretrained(resolve_checkpoint(name_or_path))
        kinds = ", ".join(config.architectures or ["nothing"])
        if "ForSequenceClassification" not in kinds or config.num_labels != 1:
            raise ValueError(
                f"reward_model: got {name_or_path} ({kinds} with {config.num_labels} labels), expected a sequence "
                "classifier with one label"
            )
        self.tokenizer = load_tokenizer(name_or_path)
        self.model = load_model(name_or_path, auto_class=AutoModelForSequenceClassification)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.get_text_config().pad_token_id = (
            self.tokenizer.pad_token_id
        )  # finds a row's last token by it
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        if torch.cuda.is_available():
            self.model = self.model.to("cuda")

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        """Return the model's scores, one per completion, any finite number.

        Args:
            prompts: Strings or chat messages, one per completion.
            completions: Strings or chat messages.
            kwargs: Not used.
        """
        rows = [self._encode(prompt, said) for prompt, said in zip(prompts, completions, strict=True)]
        scores: list[float] = []
        for start in range(0, len(rows), _BATCH_SIZE):
            part = rows[start : start + _BATCH_SIZE]
            batch = self.tokenizer.pad({"input_ids": part}, padding_side="right", return_tensors="pt")
            inputs = {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
            scores += self.model(**inputs).logits[:, 0].float().tolist()
        return scores

    def _encode(self, prompt: Any, completion: Any) -> list[int]:
        said = text_of(completion)
        if self.tokenizer.chat_template is not None:
            asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            text = render_chat([*asked, {"role": "assistant", "content": said}], self.tokenizer)
            ids = encode(text, self.tokenizer)
        else:
            asked_text = prompt if isinstance(prompt, str) else "\n".join(text_of([one]) for one in prompt)
            ids = encode(protect(f"{asked_text}\n{said}", self.tokenizer), self.tokenizer, add_special_tokens=True)
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return ids[-context:] if context else ids
