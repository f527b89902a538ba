"""Puts questions about images and sounds to a model: as token ids and features, in batches, and answered greedily.

Training, evaluation and samples all encode through here. A question is the user's turn of the tokenizer's chat
template, or without one a line of text. What a user's text spells of special tokens stays text; only the places of
images and sounds become their tokens, each as often as the encoder gives features.
"""

from collections.abc import Sequence
from typing import Any

import torch

from deepseek_records.document_tokens import start_of_text
from deepseek_records.media.images import read_image
from deepseek_records.media.item import IMAGE_PLACE, SOUND_PLACE, MediaItem
from deepseek_records.media.sounds import read_sound
from deepseek_records.user_text import encode, protect, render_chat

# Private-use characters that stand for the places while a chat template is filled in.
_STAND_INS = {IMAGE_PLACE: "\ue010", SOUND_PLACE: "\ue011"}


def encode_question(item: MediaItem, processor: Any) -> list[int]:
    """Return the ids of a question, up to where the answer begins.

    Args:
        item: The question.
        processor: Of the model.

    Raises:
        ValueError: Places and media do not match, or the chat template refuses the question.
    """
    tokenizer = processor.tokenizer
    if tokenizer.chat_template is None:
        return [
            *start_of_text(tokenizer),
            *_encode(_marked(protect(_stand_in(item.text), tokenizer) + "\n"), processor),
        ]
    turns = [{"role": "user", "content": _stand_in(item.text)}]
    return _encode(_marked(render_chat(turns, tokenizer, add_generation_prompt=True)), processor)


def encode_answer(item: MediaItem, processor: Any) -> list[int]:
    """Return the ids of an answer with what ends it.

    Args:
        item: The question.
        processor: Of the model.

    Raises:
        ValueError: The chat template opens an answer otherwise than it generates one, or nothing ends it.
    """
    tokenizer = processor.tokenizer
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: got one without end token, expected one; no answer could end")
    if tokenizer.chat_template is None:
        return [*encode(protect(item.answer, tokenizer), tokenizer), tokenizer.eos_token_id]
    turns = [{"role": "user", "content": _stand_in(item.text)}, {"role": "assistant", "content": item.answer}]
    asked = render_chat(turns[:1], tokenizer, add_generation_prompt=True)
    whole = render_chat(turns, tokenizer)
    if not whole.startswith(asked):
        raise ValueError("chat_template: got one that opens an answer otherwise than it generates one; take another")
    return encode(whole[len(asked) :], tokenizer)


def read_features(items: Sequence[MediaItem], processor: Any) -> dict[str, torch.Tensor]:
    """Return the features of all images and sounds of some questions, in order, as the model takes them.

    Args:
        items: The questions.
        processor: Of the model.

    Raises:
        ValueError: A file is damaged or missing, or the model has no encoder for it.
    """
    found: dict[str, torch.Tensor] = {}
    images = [read_image(one, item.where or item.id) for item in items for one in item.images]
    if images:
        if processor.image_seq_length is None:
            raise ValueError("data: got images, expected none; the model does not see")
        found["pixel_values"] = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    if any(item.sounds for item in items):
        if processor.audio_seq_length is None:
            raise ValueError("data: got sounds, expected none; the model does not hear")
        rate = processor.feature_extractor.sampling_rate
        sounds = [read_sound(one, rate, item.where or item.id) for item in items for one in item.sounds]
        found["input_features"] = torch.from_numpy(processor._process_audio(sounds)[0]["input_features"])
    return found


def pad(rows: Sequence[Sequence[int]], filler: int, *, is_left: bool = False) -> dict[str, torch.Tensor]:
    """Return token ids and attention mask, both `[B, S]`.

    Args:
        rows: Token ids.
        filler: The padding's id.
        is_left: Pad on the left, as generation wants it.
    """
    width = max(map(len, rows))
    fill = [[filler] * (width - len(row)) for row in rows]
    ids = [[*gap, *row] if is_left else [*row, *gap] for row, gap in zip(rows, fill, strict=True)]
    masks = [([0] * len(gap), [1] * len(row)) for row, gap in zip(rows, fill, strict=True)]
    mask = [[*gap, *own] if is_left else [*own, *gap] for gap, own in masks]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def make_batch(items: Sequence[MediaItem], processor: Any) -> dict[str, torch.Tensor]:
    """Return the model's inputs for some questions, padded on the left.

    Args:
        items: The questions.
        processor: Of the model.
    """
    rows = [encode_question(item, processor) for item in items]
    filler = processor.tokenizer.pad_token_id
    padded = pad(rows, processor.tokenizer.eos_token_id if filler is None else filler, is_left=True)
    return {**padded, **read_features(items, processor)}


@torch.no_grad()
def answer_items(model: Any, processor: Any, items: Sequence[MediaItem], max_new_tokens: int) -> list[str]:
    """Return the model's greedy answers to some questions, asked at once.

    Args:
        model: In evaluation mode.
        processor: Its own.
        items: The questions.
        max_new_tokens: The most tokens of an answer.
    """
    batch = {name: value.to(model.device) for name, value in make_batch(items, processor).items()}
    filler = processor.tokenizer.pad_token_id
    output = model.generate(
        **batch,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.eos_token_id if filler is None else filler,
    )
    texts = processor.tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def _stand_in(text: str) -> str:
    for place, sign in _STAND_INS.items():
        text = text.replace(sign, "").replace(place, sign)
    return text


def _marked(text: str) -> str:
    for place, sign in _STAND_INS.items():
        text = text.replace(sign, place)
    return text


def _encode(text: str, processor: Any) -> list[int]:
    counts = {IMAGE_PLACE: processor.image_seq_length, SOUND_PLACE: processor.audio_seq_length}
    for place, count in counts.items():
        if count is not None:
            text = text.replace(place, place * count)
        elif place in text:
            raise ValueError(f"data: got a place {place}, expected none; the model has no encoder for it")
    return encode(text, processor.tokenizer)
