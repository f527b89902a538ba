"""Tokens of large data sets, kept in the cache of `datasets` so that a second run does not tokenize again.

The file's name is a hash of the texts and of the tokenizer, so nothing else can be read back. `encode_documents` calls
it. ``HF_DATASETS_CACHE`` moves the cache, ``datasets.disable_caching()`` turns it off.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from deepseek_records.hashes import hash_rows, hash_texts, hash_tokenizer
from deepseek_records.user_text import encode_documents_plainly

logger = logging.getLogger(__name__)
_LEAST_CHARACTERS = 1_000_000  # below that tokenizing takes less than a second
_BATCH_CHARACTERS = 200_000
_FEATURES = datasets.Features({"ids": datasets.List(datasets.Value("int32"))})


def encode_cached(texts: Sequence[str], tokenizer: Any) -> Sequence[Sequence[int]]:
    """Return each text's ids, without begin and end tokens, from the cache where it has them; else with a bar.

    Args:
        texts: Documents.
        tokenizer: A `transformers` tokenizer.
    """
    length = sum(map(len, texts))
    if length < _LEAST_CHARACTERS or not datasets.is_caching_enabled():
        return encode_documents_plainly(texts, tokenizer)
    fingerprint = hash_rows([hash_texts(texts), hash_tokenizer(tokenizer)])[:32]
    path = Path(datasets.config.HF_DATASETS_CACHE) / "deepseek-moe" / f"tokens-{fingerprint}.arrow"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = datasets.Dataset.from_dict({"text": list(texts)}).map(
            lambda part: {"ids": encode_documents_plainly(part["text"], tokenizer)},
            batched=True,
            batch_size=max(1, _BATCH_CHARACTERS * len(texts) // length),
            remove_columns=["text"],
            features=_FEATURES,
            cache_file_name=str(path),
            new_fingerprint=fingerprint,
            desc="tokenizing",
        )
    except OSError as error:
        logger.warning("tokens are not cached in %s (%s)", path.parent, error.strerror)
        return encode_documents_plainly(texts, tokenizer)
    return rows.with_format("numpy")[:]["ids"]
