"""The models that Triton batches: scoring, embeddings, reward and safety; each repository names its own.

Only a stub of Triton's Python back-end can import this file: `triton_python_backend_utils` is its. What is wrong with
one request is told to that request alone, in words without paths; Triton itself would send a traceback.
"""

import importlib
from typing import Any

import torch
import triton_python_backend_utils as pb_utils
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from deepseek_records.loading import check_vocabulary, load_model, load_tokenizer
from deepseek_records.user_text import encode, protect
from deepseek_serving.triton_server.batched_compute import Ids, embeddings, head_scores, log_likelihoods
from deepseek_serving.triton_server.stub import begin_stub, device_of, read_settings, string_tensor

_MAX_PASS_TOKENS = 8192
_MAX_TEXT_BYTES = 1_000_000


class _BatchedModel:
    """Reads texts, computes all rows of a batch at once, and gives every request its rows.

    A subclass names the class to load and computes.
    """

    auto_class: type = AutoModelForCausalLM

    def initialize(self, args: dict[str, Any]) -> None:
        """Load the model; called by Triton."""
        begin_stub(args)
        self.settings = read_settings(args)
        self.context: int = self.settings["context"]
        self.load(device_of(args))

    def load(self, device: str) -> None:
        """Load the checkpoint."""
        options = {"trust_remote_code": self.settings["trust_remote_code"]}
        self.tokenizer = load_tokenizer(self.settings["checkpoint"], **options)
        self.model = load_model(self.settings["checkpoint"], auto_class=self.auto_class, **options).to(device)
        check_vocabulary(self.model, self.tokenizer)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer a batch; called by Triton."""
        told: list[Any] = [None] * len(requests)
        rows: list[Any] = []
        places: list[tuple[int, int, int]] = []
        for place, request in enumerate(requests):
            try:
                found = self.read(request)
            except ValueError as error:
                told[place] = _refuse(str(error), pb_utils.TritonError.INVALID_ARG)
            else:
                places.append((place, len(rows), len(rows) + len(found)))
                rows += found
        try:
            outputs = self.compute(rows) if rows else {}
        except Exception as error:  # whatever it is, the batch is answered and the stub lives on
            pb_utils.Logger.log_error(f"a batch failed: {type(error).__name__}")
            for place, _, _ in places:
                told[place] = _refuse("the model failed at this batch", pb_utils.TritonError.INTERNAL)
            return told
        for place, first, end in places:
            tensors = [_make(name, values[first:end]) for name, values in outputs.items()]
            told[place] = pb_utils.InferenceResponse(output_tensors=tensors)
        return told

    def read(self, request: Any) -> list[Any]:
        """Return a request's rows.

        Raises:
            ValueError: A text cannot be read or is too long.
        """
        return [self.encode("text", text) for text in self.texts(request, "text")]

    def compute(self, rows: list[Any]) -> dict[str, Any]:
        """Return the outputs by name, a row of each for each row."""
        raise NotImplementedError

    def texts(self, request: Any, name: str) -> list[str]:
        """Return the strings of an input, one per row of the request."""
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        found = []
        for value in [] if tensor is None else tensor.as_numpy().reshape(-1).tolist():
            if len(value) > _MAX_TEXT_BYTES:
                raise ValueError(f"{name}: got {len(value)} bytes, expected at most {_MAX_TEXT_BYTES}")
            try:
                found.append(value.decode())
            except UnicodeDecodeError:
                raise ValueError(f"{name}: got bytes that are not UTF-8, expected text") from None
        return found

    def encode(self, name: str, text: str, *, is_first: bool = True) -> Ids:
        """Return a text's ids, with the tokenizer's begin token where it stands first."""
        ids = encode(protect(text, self.tokenizer), self.tokenizer, add_special_tokens=is_first)
        if not ids:
            raise ValueError(f"{name}: got an empty text, expected at least one token")
        if len(ids) > self.context:
            raise ValueError(f"{name}: got {len(ids)} tokens, expected at most {self.context}")
        return ids


class ScoreModel(_BatchedModel):
    """Log-likelihood of a text, alone or after a context."""

    def read(self, request: Any) -> list[tuple[Ids, Ids]]:
        """Return ids of context and text of each row."""
        texts, contexts = self.texts(request, "text"), self.texts(request, "context")
        if not contexts:
            return [([], self.encode("text", text)) for text in texts]
        rows = []
        for context, text in zip(contexts, texts, strict=True):
            row = self.encode("context", context), self.encode("text", text, is_first=False)
            if len(row[0]) + len(row[1]) > self.context:
                raise ValueError(f"text: got {len(row[0]) + len(row[1])} tokens, expected at most {self.context}")
            rows.append(row)
        return rows

    def compute(self, rows: list[tuple[Ids, Ids]]) -> dict[str, Any]:
        """Return scores and numbers of tokens."""
        scores, counts = log_likelihoods(self.model, rows, _MAX_PASS_TOKENS)
        return {"log_likelihood": scores[:, None], "num_tokens": counts[:, None]}


class EmbedModel(_BatchedModel):
    """Mean of the last hidden states."""

    def compute(self, rows: list[Ids]) -> dict[str, Any]:
        """Return the vectors."""
        return {"embedding": embeddings(self.model, rows, _MAX_PASS_TOKENS)}


class RewardModel(_BatchedModel):
    """A reward model's score of a text."""

    auto_class = AutoModelForSequenceClassification

    def compute(self, rows: list[Ids]) -> dict[str, Any]:
        """Return the scores."""
        return {"reward": head_scores(self.model, rows, _MAX_PASS_TOKENS)[:, :1]}


class SafetyModel(_BatchedModel):
    """Class probabilities and the likeliest label, by a checkpoint or by the embedded classifier."""

    auto_class = AutoModelForSequenceClassification

    def load(self, device: str) -> None:
        """Load the checkpoint, or make the object that `module:Class` names."""
        self.classifier = None
        module, is_object, name = self.settings["checkpoint"].partition(":")
        if is_object:
            self.classifier = getattr(importlib.import_module(module), name)()
            self.labels = ["safe", "unsafe"]
            return
        super().load(device)
        self.labels = [self.model.config.id2label[number] for number in range(self.model.config.num_labels)]

    def read(self, request: Any) -> list[Any]:
        """Return the texts, or their ids for a checkpoint."""
        if self.classifier is None:
            return super().read(request)
        texts = self.texts(request, "text")
        if any(value != value for value in self.classifier.predict(texts)):
            raise ValueError("text: got another script than Latin or Han, which the embedded classifier cannot judge")
        return texts

    def compute(self, rows: list[Any]) -> dict[str, Any]:
        """Return probabilities and labels."""
        if self.classifier is None:
            scores = head_scores(self.model, rows, _MAX_PASS_TOKENS).softmax(-1)
        else:
            unsafe = torch.tensor([float(value) for value in self.classifier.predict(rows)])
            scores = torch.stack((1 - unsafe, unsafe), dim=-1)
        labels = [self.labels[number] for number in scores.argmax(-1).tolist()]
        return {"scores": scores, "label": [[label] for label in labels]}


def _make(name: str, values: Any) -> Any:
    if isinstance(values, torch.Tensor):
        return pb_utils.Tensor.from_dlpack(name, values.contiguous())
    return string_tensor(name, values)


def _refuse(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
