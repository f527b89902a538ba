"""The settings of the supervised fine-tuning stage, kept apart so that reading them imports neither torch nor TRL."""

import dataclasses
from typing import ClassVar

from deepseek_training.recipes.loading import setting
from deepseek_training.recipes.pretrain_and_adapt import MtpSettings, SplittableSettings


@dataclasses.dataclass(kw_only=True)
class SftRecipe(SplittableSettings, MtpSettings):
    """The settings of `sft`."""

    data: str = setting("dialogues", help="Conversations: embedded name, file, folder, datasets directory or Hub id.")
    messages_column: str = setting(
        "messages",
        help="Column that holds whole conversations, of any number of turns, each message with role and content; "
        "where the data have it, prompt_column and answer_column are not read.",
    )
    prompt_column: str = setting("prompt", help="Column that holds what is asked.")
    answer_column: str = setting("answer", help="Column that holds what is answered.")
    sources: list[str] = setting([], help="Keep the rows whose `source` is one of these; empty: all rows.")  # noqa: RUF009
    chat_template: str | None = setting(
        None, help="File with a Jinja chat template, saved with the tokenizer; null: the tokenizer's own."
    )
    unused: ClassVar[dict[str, str]] = {
        "sample_prompts": "held-out questions are answered",
        "eval_bytes": "num_eval_conversations says what is scored",
    }
    num_eval_conversations: int | None = setting(None, help="Held-out conversations that are scored; null: all.")

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = self.num_eval_conversations
        self.require("num_eval_conversations", wanted is None or wanted >= 2, "null or at least 2")
