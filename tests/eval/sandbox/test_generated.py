"""None of the generated hostile candidates passes, and 200 honest ones beside them do."""

import itertools

import pytest
from hostile_generator import TESTS, generate

from deepseek_eval.sandbox.client import run_tests
from deepseek_eval.tasks import humaneval, mbpp

# A prime, so that a sample meets every start, rewrite and forgery.
SAMPLE_STEP = 13


def honest() -> list[tuple[str, str]]:
    items = [*humaneval.build_items(0, None, None), *mbpp.build_items(0, 36, None)]
    return [(item.program(item.target), item.tests) for item in items]


def test_at_least_500_programs_are_generated():
    programs = generate()
    assert len(programs) >= 500
    assert len(set(programs.values())) == len(programs)
    sample = list(programs)[::SAMPLE_STEP]
    for place in range(3):
        assert {name.split(" / ")[place] for name in sample} == {name.split(" / ")[place] for name in programs}


@pytest.mark.parametrize("step", [SAMPLE_STEP, pytest.param(1, marks=pytest.mark.slow)])
def test_no_generated_candidate_passes_beside_honest_ones(step):
    programs = dict(list(generate().items())[::step])
    neighbors = list(itertools.islice(itertools.cycle(honest()[:: min(step, 4)]), max(200 // step, 1)))
    pairs = [(source, TESTS) for source in programs.values()]
    mixed = [pair for both in itertools.zip_longest(pairs, neighbors) for pair in both if pair is not None]
    results = dict(zip(map(hash, mixed), run_tests(mixed, timeout_s=10.0, num_workers=2), strict=True))
    passed = [name for name, source in programs.items() if results[hash((source, TESTS))].passed]
    assert not passed
    failed = [pair for pair in neighbors if not results[hash(pair)].passed]
    assert not failed
    assert {result.isolation for result in results.values()} == {"separate"}
