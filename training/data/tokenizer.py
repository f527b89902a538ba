"""A byte-level BPE tokenizer, trained through ``tokenizers`` and saved as ``transformers`` expects it.

The pretrain stage trains one; every later stage loads it beside the model. Padding, begin and end are three different
tokens, because a pad that equals eos hides the end of a text from the loss. None of them is added by itself, so a
prompt and its continuation can be encoded apart and joined. Every byte is in the vocabulary, so any text survives
``decode(encode(text))``.
"""

import itertools
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from deepseek_records.loading import load_tokenizer
from deepseek_training.data.texts import count_bytes, load_texts
from deepseek_training.recipes.pretrain_and_adapt import PretrainRecipe

PAD, BOS, EOS = "<|pad|>", "<|begin|>", "<|end|>"
MIN_VOCAB_SIZE = 256 + 3
MOST_TRAINING_BYTES = 100_000_000
# DeepSeek-V2's plain form: words rather than extra tokens, which a small model would see too seldom to learn.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}User: {{ message['content'] }}\n\n"
    "{% elif message['role'] == 'assistant' %}Assistant:"
    "{% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}"  # what assistant_only_loss trains
    "{% elif message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def tokenizer_for(recipe: PretrainRecipe, corpora: Sequence[Sequence[str]]) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a recipe names, or one trained on its data.

    Training it gives the same result each time, so a resumed run trains it anew. Of texts of more than
    `MOST_TRAINING_BYTES` together it sees evenly spaced documents.

    Args:
        recipe: The settings.
        corpora: The training texts, which a new tokenizer learns from unless `tokenizer_data` names others.
    """
    if recipe.tokenizer is not None:
        return load_tokenizer(recipe.tokenizer, setting="tokenizer")
    corpora = [load_texts(name, "train") for name in recipe.tokenizer_data] or corpora
    every = -(-sum(map(count_bytes, corpora)) // MOST_TRAINING_BYTES)
    texts = (text for corpus in corpora for text in itertools.islice(corpus, 0, None, max(1, every)))
    return train_tokenizer(texts, recipe.vocab_size, model_max_length=recipe.sequence_length)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, model_max_length: int = 1_000_000
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer learned from the texts.

    Args:
        texts: What the merges are counted on.
        vocab_size: Number of tokens, the 256 bytes and 3 special ones included; at least 259.
        model_max_length: Longest input the model takes, in tokens; longer ones make `transformers` warn.

    Raises:
        ValueError: The vocabulary is too small to hold every byte.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size: got {vocab_size}, expected at least {MIN_VOCAB_SIZE} (every byte and 3 special tokens)"
        )
    tokenizer = Tokenizer(models.BPE())  # and no normalizer: it would change the user's text
    # digits one by one, as DeepSeek-V3 does in threes: numbers stay comparable across lengths
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",  # generation continues the last column
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
