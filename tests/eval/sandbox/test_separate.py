"""Tests in a process of their own: honest candidates are judged as in one program, and forged values do not cross."""

import math
import random
import sys
from collections import deque
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from candidates import AGREES, FORGED, SHARED

from deepseek_eval.sandbox import client
from deepseek_eval.sandbox.client import run_tests
from deepseek_eval.sandbox.plan import plan_tests
from deepseek_eval.tasks import humaneval
from deepseek_eval.tasks.rows import read_rows

sys.path.insert(0, str(Path(client.__file__).parent))
import plain_data


@pytest.fixture(scope="module")
def outcomes():
    pairs = [*AGREES.values(), *SHARED.values()]
    names = [*AGREES, *(f"shared:{name}" for name in SHARED)]
    return dict(zip(names, run_tests(pairs, timeout_s=10.0), strict=True))


@pytest.mark.parametrize("name", AGREES)
def test_a_correct_candidate_passes_as_in_one_program(outcomes, name):
    candidate, tests = AGREES[name]
    if name not in ("a name of Python's", "recursion"):
        exec(compile(f"{candidate}\n\n{tests}", "<string>", "exec"), {}) if "fork" not in candidate else None
    assert (outcomes[name].passed, outcomes[name].isolation) == (True, "separate"), outcomes[name]


@pytest.mark.parametrize("name", SHARED)
def test_what_cannot_cross_runs_in_one_program_and_says_so(outcomes, name):
    result = outcomes[f"shared:{name}"]
    assert (result.passed, result.isolation) == (True, "shared"), result


@pytest.fixture(scope="module")
def forged():
    return dict(zip(FORGED, run_tests(FORGED.values(), timeout_s=2.0), strict=True))


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_value_or_end_does_not_pass(forged, name):
    assert not forged[name].passed and forged[name].isolation == "separate", forged[name]
    assert "sandbox" not in forged[name].reason


def test_all_tests_of_humaneval_and_mbpp_can_be_separate():
    """By what their text asks for; that their arguments cross as well is the slow test's part."""
    tests = [item.tests for item in humaneval.build_items(0, None, None)]
    tests += [_mbpp_tests(row) for row in read_rows("mbpp", None)]
    assert len(tests) == 164 + 974
    assert not [text for text in tests if plan_tests(text).shared_because]


def _mbpp_tests(row) -> str:
    setup = f"{row['test_setup_code']}\n" if row["test_setup_code"] else ""
    return setup + "\n".join(row["test_list"] + row["challenge_test_list"])


def _gold() -> list[tuple[str, str]]:
    pairs = [(item.program(item.target), item.tests) for item in humaneval.build_items(0, None, None)]
    # The reference solution of problem 123 searches for ten seconds.
    return pairs + [(row["code"], _mbpp_tests(row)) for row in read_rows("mbpp", None) if row["task_id"] != 123]


@pytest.mark.parametrize("step", [60, pytest.param(1, marks=pytest.mark.slow)])
def test_reference_solutions_pass_apart_from_their_tests(step):
    results = list(run_tests(_gold()[::step], timeout_s=20.0))
    assert not [result for result in results if not result.passed or result.isolation != "separate"]


def test_helpers_of_the_prompt_are_the_prompts():
    """HumanEval/32 checks a root with `poly`: a completion that defines its own does not choose what that returns."""
    item = next(item for item in humaneval.build_items(0, None, None) if item.id == "HumanEval/32")
    cheat = item.program("    return 0.0\n\ndef poly(xs, x):\n    return 0.0\n")
    right, wrong = run_tests([(item.program(item.target), item.tests), (cheat, item.tests)], timeout_s=10.0)
    assert right.passed and not wrong.passed


def random_value(generator: random.Random, depth: int = 0):
    scalars = [None, True, False, 0, -1, 1 << 90, 0.5, -math.inf, "", "x" * 100, "\ud800", b"\0", 3j, ..., int]
    scalars += [Decimal("1.10"), Fraction(2, 3), range(1, 9, 2), bytearray(b"q"), KeyError]
    if depth > 3 or generator.random() < 0.4:
        return generator.choice(scalars)
    parts = [random_value(generator, depth + 1) for _ in range(generator.randrange(4))]
    hashable = [part for part in parts if part.__hash__ and not isinstance(part, tuple)]
    kind = generator.choice([list, tuple, deque, set, frozenset, dict])
    if kind is dict:
        return dict.fromkeys(hashable, parts)
    return kind(hashable) if kind in (set, frozenset) else kind(parts)


def _refuse(*_):
    raise plain_data.Invalid("refused")


def test_values_cross_unchanged_and_random_bytes_are_refused():
    generator = random.Random(0)
    num_changed = 0
    for _ in range(400):
        value = random_value(generator)
        writer = plain_data.Writer(_refuse)
        writer.write(value)
        data = writer.finish()
        assert plain_data.Reader(data, _refuse).read() == value
        # Whatever is changed, cut or added, the reader returns exact builtin types or refuses.
        for _ in range(20):
            damaged = bytearray(data)
            for _ in range(generator.randint(1, 3)):
                damaged[generator.randrange(len(damaged))] = generator.choice(b"NTFiLtDSZQRksubyfrqgOP\x00\x01\xff")
            try:
                result = plain_data.Reader(bytes(damaged[: generator.randint(0, 2 * len(damaged))]), _refuse).read()
            except plain_data.Invalid:
                num_changed += 1
            else:
                assert type(result).__module__ in ("builtins", "collections", "decimal", "fractions")
    assert num_changed > 3000


def test_depth_and_size_are_limited():
    deep: list = []
    for _ in range(plain_data.MAX_DEPTH + 1):
        deep = [deep]
    with pytest.raises(plain_data.Uncrossable):
        plain_data.Writer(_refuse).write(deep)
    with pytest.raises(plain_data.Invalid, match="deeply"):
        plain_data.Reader(b"L\x01\0\0\0" * 10_000 + b"N", _refuse).read()
    with pytest.raises(plain_data.Invalid, match="more parts"):
        plain_data.Reader(b"L\xff\xff\xff\xff", _refuse).read()
    with pytest.raises(plain_data.Invalid, match="nothing"):
        plain_data.Reader(b"t\x01\0\0\0R\0\0\0\0", _refuse).read()
