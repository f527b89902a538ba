import numpy as np
import pytest

from deepseek_training.data.packing import encode_documents
from deepseek_training.data.texts import load_texts
from deepseek_training.data.tokenizer import train_tokenizer
from deepseek_training.trainer.bigram import BigramModel


@pytest.fixture(scope="module")
def stream():
    """Real text: half a book to train on, the next part to score; a vocabulary small enough for dense tables."""
    book = load_texts("books")[3][:200_000]
    tokenizer = train_tokenizer([book], 400)
    train, held_out = encode_documents([book[:160_000], book[160_000:]], tokenizer)
    return train, held_out, len(tokenizer)


def interpolated_by_em(train, held_out, vocab_size, num_steps=50):
    """Nats of an independent baseline: Jelinek-Mercer over bigram, unigram and uniform, weights fitted by EM."""
    fit, tune = train[: len(train) * 9 // 10], train[len(train) * 9 // 10 :]
    unigram = np.bincount(fit, minlength=vocab_size) / len(fit)
    table = np.zeros((vocab_size, vocab_size))
    np.add.at(table, (fit[:-1], fit[1:]), 1)
    bigram = table / np.maximum(table.sum(1, keepdims=True), 1)
    bucket = np.digitize(table.sum(1), [1, 10, 100, 1000])  # own weights for rare and frequent contexts
    weights = np.full((5, 3), 1 / 3)

    def parts(tokens):
        uniform = np.full(len(tokens) - 1, 1 / vocab_size)
        return np.stack([bigram[tokens[:-1], tokens[1:]], unigram[tokens[1:]], uniform], 1)

    tuning = parts(tune)
    for _ in range(num_steps):
        joint = tuning * weights[bucket[tune[:-1]]]
        posterior = joint / joint.sum(1, keepdims=True)
        for index in range(5):
            chosen = posterior[bucket[tune[:-1]] == index]
            if len(chosen):
                weights[index] = chosen.mean(0)
    return -np.log((parts(held_out) * weights[bucket[held_out[:-1]]]).sum(1))


def test_probabilities_of_every_context_add_up_to_one(stream):
    train, _, vocab_size = stream
    bigram = BigramModel([train], vocab_size)
    for context in [0, int(train[1]), *np.unique(train)[:20]]:  # 0 is the pad token, a context never seen
        every = np.array([token for pair in ((context, word) for word in range(vocab_size)) for token in pair])
        assert np.exp(-bigram.nats(every)[::2]).sum() == pytest.approx(1, abs=1e-9)


def test_matches_the_formula_on_a_toy():
    # tokens 0..3; pairs 01 x2, 12, 10, 02, 20; every count-of-counts that is 0 is taken as 1
    bigram = BigramModel([np.array([0, 1, 2]), np.array([0, 1, 0, 2, 0])], 4)
    counts = {(0, 1): 2, (1, 2): 1, (1, 0): 1, (0, 2): 1, (2, 0): 1}
    share = 4 / (4 + 2 * 1)  # n1=4, n2=1
    discount = {1: 1 - 2 * share * 1 / 4, 2: max(2 - 3 * share * 1 / 1, 0.1)}
    # contexts before each token: 0 <- {1, 2}, 1 <- {0}, 2 <- {1, 0}; so n1=1, n2=2
    low = 1 / (1 + 2 * 2)
    d1, d2 = 1 - 2 * low * 2 / 1, max(2 - 3 * low * 1 / 2, 0.1)
    unigram = np.array([2 - d2, 1 - d1, 2 - d2, 0]) / 5 + (2 * d2 + d1) / 5 / 4
    for context, word in [(0, 1), (0, 2), (0, 3), (1, 2), (3, 1)]:
        total = sum(count for (first, _), count in counts.items() if first == context)
        freed = sum(discount[count] for (first, _), count in counts.items() if first == context)
        count = counts.get((context, word), 0)
        kept = (count - discount[count]) / total if count else 0.0
        expected = kept + (freed / total if total else 1.0) * unigram[word]
        assert np.exp(-bigram.nats(np.array([context, word])))[0] == pytest.approx(expected, rel=1e-12)


def test_is_at_least_as_strong_as_an_interpolation_fitted_by_em(stream):
    train, held_out, vocab_size = stream
    ours = BigramModel([train], vocab_size).nats(held_out).mean()
    assert ours < interpolated_by_em(train, held_out, vocab_size).mean()


def test_no_pair_is_counted_across_documents():
    bigram = BigramModel([np.array([1, 2]), np.array([3, 4])], 6)
    assert (2 * 6 + 3) not in bigram.pairs
