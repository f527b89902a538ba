"""Which tokens of a conversation are the model's own: by the templates that models are released with."""

from pathlib import Path

import pytest
import trl
from trl.chat_template_utils import is_chat_template_stop_token_trained

from deepseek_training.data.conversations import encode_conversation, question_of
from deepseek_training.data.texts import load_texts
from deepseek_training.data.tokenizer import CHAT_TEMPLATE, train_tokenizer

R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}User: {{ m['content'] }}\n\n{% else %}"
    "Assistant:{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:<think>\n{% endif %}"
)
RELEASED = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
}
ONE = [{"role": "user", "content": "What is asthma?"}, {"role": "assistant", "content": "A disease of the lungs."}]
TWO = [*ONE, {"role": "user", "content": "Is it frequent?"}, {"role": "assistant", "content": "Yes, very."}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(load_texts("dialogues", "validation"), 400)


def answers_of(encoded, tokenizer):
    """The text of each stretch of the model's own tokens."""
    texts, stretch = [], []
    for number, own in [*zip(encoded.input_ids, encoded.is_answer, strict=True), (None, False)]:
        if own:
            stretch.append(number)
        elif stretch:
            texts.append(tokenizer.decode(stretch))
            stretch = []
    return texts


def encode_by(template, messages, tokenizer):
    tokenizer.chat_template = template
    return encode_conversation({"messages": messages}, tokenizer, 100_000)


@pytest.mark.parametrize("name", ["ours", "r1", *RELEASED])
def test_the_answers_are_found_and_nothing_else(name, tokenizer):
    template = {"ours": CHAT_TEMPLATE, "r1": R1, **RELEASED}[name]
    for messages in (ONE, TWO):
        if name.startswith(("idefics3", "llava")):
            messages = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
        wanted = ["A disease of the lungs.", "Yes, very."][: len(messages) // 2]
        examples = encode_by(template, messages, tokenizer)
        found = [text for one in examples for text in answers_of(one, tokenizer)]
        assert len(found) == len(wanted)
        for text, answer in zip(found, wanted, strict=True):
            # Before an answer may stand what the model writes itself (an empty thought, a channel); behind it its end.
            before, _, after = text.partition(answer)
            assert answer in text and "asthma" not in text and "frequent" not in text
            assert len(after) <= 40 and len(before) <= 30 and "ssistant" not in before


def test_what_the_generation_prompt_opens_is_not_trained(tokenizer):
    (encoded,) = encode_by(R1, ONE, tokenizer)
    assert answers_of(encoded, tokenizer) == ["A disease of the lungs.<|end|>"]
    # where the answer's first letters are those of the generation prompt, they are still the answer's
    (encoded,) = encode_by(R1, [ONE[0], {"role": "assistant", "content": "<thin> air"}], tokenizer)
    assert answers_of(encoded, tokenizer) == ["<thin> air<|end|>"]
    # and reasoning that stays in the text begins where the generation prompt ends
    kept = R1.replace(".split('</think>')[-1]", "")
    (encoded,) = encode_by(kept, [ONE[0], {"role": "assistant", "content": "<think>\nHm.</think>Air."}], tokenizer)
    assert answers_of(encoded, tokenizer) == ["Hm.</think>Air.<|end|>"]


def test_labels_hide_all_but_the_answers(tokenizer):
    (encoded,) = encode_by(CHAT_TEMPLATE, TWO, tokenizer)
    kept = [number for number in encoded.labels if number != -100]
    assert tokenizer.decode(kept) == " A disease of the lungs.<|end|> Yes, very.<|end|>"
    assert len(encoded.labels) == len(encoded.input_ids)


def test_the_answers_that_trl_trains_by_our_template_are_the_same(tokenizer):
    """`assistant_only_loss` asks the template for them, by its ``generation`` blocks."""
    tokenizer.chat_template = CHAT_TEMPLATE
    for messages in (ONE, TWO):
        (encoded,) = encode_conversation({"messages": messages}, tokenizer, 10_000)
        asked = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
        assert asked["input_ids"] == encoded.input_ids
        assert [bool(own) for own in asked["assistant_masks"]] == encoded.is_answer
    assert is_chat_template_stop_token_trained(tokenizer)


def test_a_template_that_generates_otherwise_than_it_trains_is_refused(tokenizer):
    other = CHAT_TEMPLATE.replace("{% if add_generation_prompt %}Assistant:", "{% if add_generation_prompt %}<bot>")
    with pytest.raises(ValueError, match=r"got '<bot>' as generation prompt, expected .*'Assistant: '") as caught:
        encode_by(other, ONE, tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "length", "message"),
    [
        (ONE[:1], 99, "without a turn of the assistant"),
        (ONE, 8, "leaves no room for an answer"),
        ([{"role": "narrator", "content": "x"}, ONE[1]], 99, "refuses the conversation .unknown role narrator"),
    ],
)
def test_a_conversation_that_cannot_train_is_told_in_one_line(messages, length, message, tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    with pytest.raises(ValueError, match=message) as caught:
        encode_conversation({"messages": messages}, tokenizer, length)
    assert "\n" not in str(caught.value)


def test_the_question_is_what_stands_before_the_last_answer():
    assert question_of({"messages": TWO}) == TWO[:3]
    assert question_of({"prompt": "a", "answer": "b"}) == [{"role": "user", "content": "a"}]
