"""Tests that share a costly fixture run in one worker.

pytest-xdist 3.8.0 names a group in the test's id, which pytest 9.2 lets it set without effect: every worker then
builds the fixtures anew, and only the clock tells. A file's own fixtures make a group by themselves (`conftest.py`).
"""

import pytest


@pytest.fixture(scope="module")
def shared():
    return "built once"


def test_a_files_fixture_makes_a_group(request, worker_id, shared):
    _needs_workers(request, worker_id)
    assert request.node.nodeid.endswith("@tests/house/test_grouping.py")


def _needs_workers(request, worker_id):
    if worker_id == "master" or request.config.getoption("loadgroup", False) is not True:
        pytest.skip("runs with -n and --dist loadgroup, as make test does")


@pytest.mark.xdist_group("grouping")
def test_a_group_is_part_of_the_tests_id(request, worker_id):
    _needs_workers(request, worker_id)
    assert request.node.nodeid.endswith("@grouping")
