"""Which process is called slow, by how much, and when; `test_failing_processes` finds one of two."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deepseek_training.trainer.slow_process import SlowProcess

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def watcher():
    torch.manual_seed(0)
    return SlowProcess(LlamaForCausalLM(LlamaConfig(vocab_size=32, **SMALL)))


def lines(slow, *windows):
    return [list(slow.compare(0, seconds, range(1 + place, 2 + place))) for place, seconds in enumerate(windows)]


def test_slow_twice_in_a_row_is_told_once():
    told = lines(watcher(), [0.1, 0.1, 0.3], [0.1, 0.1, 0.32], [0.1, 0.1, 0.3], [0.1, 0.1, 0.3])
    assert [len(one) for one in told] == [0, 1, 0, 0]
    assert told[1][0] == (
        "process 2 is slow: 3.2 times the others' time for its layers' attention in steps 2 to 2 (0.32 s against "
        "0.1 s per step); all wait for it"
    )


def test_one_slow_window_or_a_small_difference_is_not_told():
    assert not any(lines(watcher(), [0.1, 0.3], [0.1, 0.1], [0.1, 0.3], [0.1, 0.14], [0.1, 0.14]))
    assert not any(lines(watcher(), [0.001, 0.002], [0.001, 0.002], [0.001, 0.002])), "below what machines differ by"


def test_only_training_passes_are_timed():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **SMALL))
    slow = SlowProcess(model)
    tokens = torch.arange(8).unsqueeze(0)
    model.eval()(tokens)
    assert slow._seconds == [0.0, 0.0]
    model.train()(tokens)
    assert slow._seconds[0] > 0
    assert list(slow.timed(iter([1, 2]))) == [1, 2] and slow._seconds[1] > 0
