"""Hashes of what a run is made of: texts, rows, a model's weights, a tokenizer.

`RunFolder.hold_to` keeps them, so that a run that was interrupted goes on with the same content or not at all. Equal
paths may hold other files by then; equal hashes mean equal content.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedTokenizerBase

# Elements of a tensor that are hashed, evenly spaced; a smaller tensor is hashed whole.
_MAX_ELEMENTS = 65_536


def hash_texts(texts: Iterable[str]) -> str:
    """Return the SHA-256 of texts in their order, in hexadecimal.

    Args:
        texts: Documents; where one ends and the next begins is part of the hash.
    """
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "big"))
        digest.update(content)
    return digest.hexdigest()


def hash_rows(rows: Iterable[Any]) -> str:
    """Return the SHA-256 of JSON values in their order; the order of an object's keys does not matter.

    Args:
        rows: Anything `json` takes.
    """
    return hash_texts(json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":")) for row in rows)


def hash_array(array: "np.ndarray") -> str:
    """Return the SHA-256 of an array's shape, type and bytes.

    Args:
        array: Any; it is not copied where its rows lie one behind the other.
    """
    import numpy as np

    digest = hashlib.sha256(f"{array.dtype} {array.shape}\n".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def hash_model(model: "torch.nn.Module") -> str:
    """Return a SHA-256 of a model's parameters and buffers as they are in memory.

    Of a tensor with more than 65,536 elements that many evenly spaced ones are hashed, so that a model of 154 B
    parameters takes seconds. Training moves nearly every element and is seen; one changed element may not be.

    Args:
        model: Any model; quantized and adapted ones are hashed as they are.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.is_meta:
            continue
        flat = tensor.detach().reshape(-1)
        if flat.numel() > _MAX_ELEMENTS:
            # Not arange with a step: the last elements would be left out.
            places = torch.linspace(0, flat.numel() - 1, _MAX_ELEMENTS, dtype=torch.float64, device=flat.device)
            flat = flat[places.long()]
        digest.update(flat.contiguous().cpu().view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def hash_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the SHA-256 of what decides a tokenizer's ids: vocabulary, rules, special tokens and chat template.

    Args:
        tokenizer: Any tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)  # only fast ones have it
    rules = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    if isinstance(rules, dict):  # Set by calls, not by the vocabulary.
        rules.pop("padding", None)
        rules.pop("truncation", None)
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return hash_rows([rules, special, tokenizer.chat_template])
