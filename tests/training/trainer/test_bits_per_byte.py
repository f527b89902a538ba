import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_records.document_tokens import cut_windows
from deepseek_training.trainer.bigram import BigramModel
from deepseek_training.trainer.bits_per_byte import measure_bigram, measure_model
from modeling_deepseek import DeepseekConfig

VOCAB_SIZE = 50


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = DeepseekConfig.from_preset("debug", vocab_size=VOCAB_SIZE, hidden_dropout=0.1)
    return AutoModelForCausalLM.from_config(config)


def documents(*lengths):
    generator = np.random.default_rng(0)
    return [generator.integers(3, VOCAB_SIZE, length).astype(np.int32) for length in lengths]


def test_a_document_within_the_context_equals_the_plain_sum(model):
    docs = documents(17, 5)
    expected = 0.0
    with torch.no_grad():
        for doc in docs:
            tokens = torch.from_numpy(doc.astype(np.int64))[None]
            logps = model.eval()(input_ids=tokens).logits[0, :-1].double().log_softmax(-1)
            expected -= logps.gather(1, tokens[0, 1:, None]).sum().item()
    measured = measure_model(model, docs, 60, sequence_length=32)
    assert measured.value == pytest.approx(expected / math.log(2) / 60, rel=1e-6)
    assert measured.num_tokens == 16 + 4 and measured.num_windows == 2


def test_batching_and_padding_change_nothing(model):
    docs = documents(70, 33, 8, 2)
    values = {size: measure_model(model, docs, 100, sequence_length=16, batch_size=size).value for size in (1, 3, 64)}
    assert values[1] == pytest.approx(values[3], rel=1e-5) and values[1] == pytest.approx(values[64], rel=1e-5)


@pytest.mark.parametrize("sequence_length", [4, 7, 16, 100])
def test_every_token_but_the_first_is_a_target_once_and_has_context(sequence_length):
    docs = documents(1, 2, 7, 16, 17, 61)
    seen = [np.zeros(len(doc), dtype=int) for doc in docs]
    for window in cut_windows(docs, sequence_length):
        seen[window.document][window.first_target : window.end] += 1
        assert window.begin < window.first_target and window.end - window.begin <= sequence_length
        context = window.first_target - window.begin
        assert window.begin == 0 or context == max(1, sequence_length // 4)
    for count in seen:
        assert count[0] == 0 and (count[1:] == 1).all()


def test_uniform_model_scores_the_logarithm_of_its_vocabulary():
    class Uniform(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, use_cache):
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, VOCAB_SIZE)})

    measured = measure_model(Uniform(), documents(40, 9), 123, sequence_length=8)
    assert measured.value == pytest.approx(math.log2(VOCAB_SIZE) * (39 + 8) / 123, rel=1e-6)
    assert measured.stderr == pytest.approx(0, abs=1e-9)


def test_mode_and_random_state_are_left_alone(model):
    model.train()
    state = torch.get_rng_state()
    first, second = (measure_model(model, documents(30), 50, sequence_length=16).value for _ in range(2))
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert first == second  # dropout is off


def test_bigram_is_scored_on_the_same_tokens():
    docs = documents(90, 40)
    bigram = BigramModel(docs, VOCAB_SIZE)
    measured = measure_bigram(bigram, docs, 100, sequence_length=16)
    total = sum(bigram.nats(doc).sum() for doc in docs)
    assert measured.value == pytest.approx(total / math.log(2) / 100, rel=1e-12)
    assert measured.num_tokens == 89 + 39 and measured.stderr > 0


def test_standard_error_matches_the_spread_of_repeated_samples():
    generator = np.random.default_rng(1)
    errors, values = [], []
    for _ in range(300):
        docs = [generator.integers(3, VOCAB_SIZE, 400).astype(np.int32)]
        bigram = BigramModel([np.arange(3, VOCAB_SIZE).repeat(3)], VOCAB_SIZE)
        measured = measure_bigram(bigram, docs, 400, sequence_length=16)
        errors.append(measured.stderr)
        values.append(measured.value)
    assert np.std(values) == pytest.approx(np.mean(errors), rel=0.15)
