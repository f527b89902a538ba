"""Text that spells a special token stays text, by every way from a text to ids and with every kind of tokenizer."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deepseek_eval.answers.generation import encode_prompt as encode_evaluated
from deepseek_records.user_text import encode, encode_chat, encode_documents_plainly, protect, render_chat, show
from deepseek_training.data.conversations import encode_conversation
from deepseek_training.data.packing import encode_documents
from deepseek_training.data.prompts import encode_prompt
from deepseek_training.data.texts import load_texts
from deepseek_training.data.tokenizer import train_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def ours():
    return train_tokenizer(load_texts("dialogues", "validation"), 400)


@pytest.fixture(scope="module")
def chatml(ours):
    """Ours with turns of special tokens, one of which takes off the spaces behind it, and a begin token by itself."""
    tokenizer = train_tokenizer(load_texts("dialogues", "validation"), 400)
    turns = [AddedToken("<|im_start|>", special=True, rstrip=True), AddedToken("<|im_end|>", special=True)]
    tokenizer.add_special_tokens({"additional_special_tokens": turns})
    tokenizer.add_tokens(["<think>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="module")
def sentencepiece():
    """A tokenizer that puts a space in front of a text, as Llama 2's does."""
    letters = [chr(number) for number in range(33, 127)]
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", "<unk>", "\u2581", "\n", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    wrapped.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    return wrapped


@pytest.fixture(params=["ours", "chatml", "sentencepiece"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def spelled(tokenizer):
    return "".join(f"what is {token}? " for token in tokenizer.all_special_tokens) + "\U000f0000 is odd"


def count_special(ids, tokenizer):
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return sum(number in special for number in ids)


def test_no_way_in_makes_a_special_token_of_text(tokenizer):
    evil, plain = spelled(tokenizer), "what is that? "
    turns = [{"role": "user", "content": evil}, {"role": "assistant", "content": f"It is {evil}"}]
    mild = [{"role": "user", "content": plain}, {"role": "assistant", "content": plain}]
    ways = {
        "documents": (encode_documents([evil], tokenizer)[0], encode_documents([plain], tokenizer)[0]),
        "chat": (encode_chat(turns, tokenizer), encode_chat(mild, tokenizer)),
        "messages": (
            encode_conversation({"messages": turns}, tokenizer, 4096)[0].input_ids,
            encode_conversation({"messages": mild}, tokenizer, 4096)[0].input_ids,
        ),
        "rows": (
            encode_conversation({"prompt": evil, "answer": evil}, tokenizer, 4096)[0].input_ids,
            encode_conversation({"prompt": plain, "answer": plain}, tokenizer, 4096)[0].input_ids,
        ),
        "prompt by chat": (encode_prompt(evil, tokenizer, None), encode_prompt(plain, tokenizer, None)),
        "prompt": (encode_prompt(evil, tokenizer, "{prompt}\n"), encode_prompt(plain, tokenizer, "{prompt}\n")),
        "evaluated chat": (
            encode_evaluated(tokenizer, render_chat(turns[:1], tokenizer, add_generation_prompt=True)),
            encode_evaluated(tokenizer, render_chat(mild[:1], tokenizer, add_generation_prompt=True)),
        ),
        "generate": (
            encode(protect(evil, tokenizer), tokenizer, add_special_tokens=True),
            encode(protect(plain, tokenizer), tokenizer, add_special_tokens=True),
        ),
    }
    found = {name: count_special(ids, tokenizer) for name, (ids, _) in ways.items()}
    assert found == {name: count_special(ids, tokenizer) for name, (_, ids) in ways.items()}
    text = tokenizer.decode(ways["chat"][0], skip_special_tokens=True)
    if tokenizer.unk_token is None:  # a byte-level tokenizer gives every sign back
        assert text.count(evil.strip()) == 2


def test_the_templates_own_tokens_stay_tokens(chatml):
    assert (
        encode_prompt("a <|im_end|>", chatml, "<|im_start|>{prompt}<|im_end|>").count(
            chatml.convert_tokens_to_ids("<|im_end|>")
        )
        == 1
    )
    # an added token that is not special, as in answers with reasoning
    ids = encode_chat([{"role": "assistant", "content": "<think>so</think> <|im_end|>"}], chatml)
    assert ids.count(chatml.convert_tokens_to_ids("<think>")) == 1


def test_text_that_spells_nothing_is_encoded_as_the_tokenizer_alone_does(tokenizer):
    turns = [{"role": "user", "content": " Who?\n\nWhy <b>"}, {"role": "assistant", "content": "Me. "}]
    assert encode_chat(turns, tokenizer) == tokenizer.apply_chat_template(turns, return_dict=False)
    text = "One <two> three\n"
    assert encode(protect(text, tokenizer), tokenizer, add_special_tokens=True) == tokenizer(text)["input_ids"]
    assert encode_documents_plainly([text], tokenizer)[0] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_marked_text_is_split_as_an_unmarked_one(tokenizer):
    """Beside a spelled token the rest of the conversation keeps its tokens: the path for marked text is the same."""
    turns = [{"role": "user", "content": "Who is it?\n"}, {"role": "assistant", "content": " Me, twice."}]
    plain = encode_chat(turns, tokenizer)
    token = tokenizer.eos_token
    marked = encode_chat([turns[0], {**turns[1], "content": f"{turns[1]['content']} {token}"}], tokenizer)
    same = next(n for n, (a, b) in enumerate(zip(plain, marked, strict=False)) if a != b)
    assert same >= len(plain) - 2  # the end of the turn


def test_shown_text_has_no_marks(tokenizer):
    text = spelled(tokenizer)
    assert protect(text, tokenizer) != text and show(protect(text, tokenizer)) == text


def test_a_tokenizer_that_cannot_spell_is_refused_in_one_line():
    vocabulary = [("<unk>", 0.0), ("</s>", -1.0), ("a", -2.0), ("<", -9.0), (">", -9.0), ("/", -9.0), ("s", -9.0)]
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram(vocabulary, unk_id=0)), eos_token="</s>", unk_token="<unk>"
    )
    assert encode_documents_plainly(["a"], wrapped)
    for way in (encode_documents_plainly, lambda texts, tokenizer: encode(protect(texts[0], tokenizer), tokenizer)):
        with pytest.raises(ValueError, match=r"got its special token '</s>' for text that spells it") as caught:
            way(["a</s>a"], wrapped)
        assert "\n" not in str(caught.value)


def test_a_saved_tokenizer_gives_the_same(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "user", "content": spelled(ours)}]
    assert encode_chat(turns, again) == encode_chat(turns, ours)
