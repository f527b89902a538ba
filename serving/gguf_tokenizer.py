"""A byte-level BPE tokenizer as GGUF metadata.

llama.cpp does not read ``tokenizer.json``: it has the vocabulary, the merges and the *name* of a way to split text
before merging, each way written out in its source. A tokenizer whose split has no such name is refused, for it would
load and cut numbers or words in other places.
"""

from pathlib import Path
from typing import Any

from deepseek_records.json_files import read_object

# Our steps before merging -> llama.cpp's name of an equal: gpt-2's expression alone, or every digit apart before it.
PRE_TOKENIZERS = {"ByteLevel": "gpt-2", "Digits+ByteLevel": "smollm"}
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5  # llama.cpp's kinds of token


def write_tokenizer(writer: Any, model_path: Path, vocab_size: int) -> None:
    """Write the byte-level BPE tokenizer.

    Args:
        writer: A `gguf.GGUFWriter`.
        model_path: The folder with ``tokenizer.json``.
        vocab_size: Rows of the embedding; rows beyond the tokenizer's become unused tokens.

    Raises:
        ValueError: No tokenizer, or one that llama.cpp would split text with differently.
    """
    from transformers import PreTrainedTokenizerFast

    path = model_path / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"model: {model_path} holds no tokenizer.json, which a GGUF file needs")
    state = read_object(path, "tokenizer")
    settings = model_path / "tokenizer_config.json"
    if settings.is_file():
        read_object(settings, "tokenizer")
    if state["model"]["type"] != "BPE" or state.get("normalizer"):
        raise ValueError(
            f"tokenizer: {state['model']['type']} with normalizer {state.get('normalizer')} is not handled"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path)
    special = {token["id"] for token in state["added_tokens"]}
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    if texts and max(texts) >= vocab_size:
        raise ValueError(f"tokenizer: got token {max(texts)}, expected at most {vocab_size - 1}, the model's last row")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(state))
    writer.add_token_list([texts.get(i, f"[UNUSED{i}]") for i in range(vocab_size)])
    writer.add_token_types(
        [_CONTROL if i in special else _NORMAL if i in texts else _UNUSED for i in range(vocab_size)]
    )
    merges = state["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    for add, index in ((writer.add_bos_token_id, bos), (writer.add_eos_token_id, eos), (writer.add_pad_token_id, pad)):
        if index is not None:
            add(index)
    writer.add_add_bos_token(bos is not None and tokenizer("a").input_ids[0] == bos)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(state: dict[str, Any]) -> str:
    """llama.cpp's name for the way a tokenizer splits text before merging."""
    pre = state.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    digits = [step for step in steps if step.get("type") == "Digits"]
    last = steps[-1]
    is_plain = last.get("type") == "ByteLevel" and last.get("use_regex", True) and not last.get("add_prefix_space")
    key = "+".join(step.get("type", "none") for step in steps)
    if key not in PRE_TOKENIZERS or not is_plain or any(not step.get("individual_digits") for step in digits):
        raise ValueError(
            f"tokenizer: llama.cpp has no equal of the pre_tokenizer {key}; allowed: {list(PRE_TOKENIZERS)}"
        )
    return PRE_TOKENIZERS[key]
