"""Reads tests and finds what they take from a candidate, and whether they can run in a process apart from it.

Called by ``client.py``, once for each text of tests. What is decided here depends on the tests alone: a candidate has
no part in whether it is judged from outside.
"""

import ast
import builtins
import functools
import symtable
from dataclasses import dataclass

# Modules whose use by tests shows nothing of the process in which the candidate runs. With any other (sys, io,
# contextlib, unittest, asyncio, ...) a test may look at the candidate's output, patch it, or set limits for it.
_PURE_MODULES = frozenset(
    (
        *("__future__", "bisect", "cmath", "collections", "copy", "dataclasses", "datetime", "decimal", "enum"),
        *("fractions", "functools", "heapq", "itertools", "json", "math", "numbers", "operator", "random", "re"),
        *("statistics", "string", "textwrap", "time", "typing"),
    )
)
# Names with which tests could look into a namespace that is not theirs any more, or set a state for the candidate.
_REACHING = frozenset(
    ("globals", "locals", "vars", "eval", "exec", "__import__", "dir", "compile", "input", "open", "breakpoint")
)
_SETTING = frozenset(("seed", "setstate", "getcontext", "setcontext", "localcontext", "setrecursionlimit"))


@dataclass(frozen=True)
class TestPlan:
    """How tests can be run.

    Args:
        names: What they take from the candidate.
        imports: Their top-level imports, which in one file would serve the candidate too.
        shared_because: Why they must run in the candidate's process; None if they need not.
    """

    __test__ = False  # Not a test of pytest's.

    names: tuple[str, ...] = ()
    imports: str = ""
    shared_because: str | None = None


@functools.lru_cache(maxsize=4096)
def plan_tests(tests: str) -> TestPlan:
    """Return how to run tests.

    Args:
        tests: Python source that raises when the candidate is wrong.
    """
    try:
        tree = ast.parse(tests)
        table = symtable.symtable(tests, "<tests>", "exec")
        reason = _find_reason(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return TestPlan(shared_because="the tests are not a program by themselves")
    if reason:
        return TestPlan(shared_because=reason)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    used, bound = _find_names(table)
    names = used - bound - set(dir(builtins))
    if not names:
        # A candidate may be asked to define anew what Python has (MBPP's `sum`).
        called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        names = called & set(dir(builtins))
    return TestPlan(tuple(sorted(names)), "\n".join(map(ast.unparse, imports)))


def _find_reason(tree: ast.Module) -> str | None:
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or "."]
        foreign = [name for name in modules if name.partition(".")[0] not in _PURE_MODULES]
        if foreign:
            return f"the tests import {foreign[0]}"
        if isinstance(node, ast.Name) and node.id in _REACHING:
            return f"the tests use {node.id}"
        if isinstance(node, ast.Attribute) and node.attr in _SETTING:
            return f"the tests use {node.attr}"
        if isinstance(node, ast.ImportFrom) and any(alias.name in _SETTING | {"*"} for alias in node.names):
            return f"the tests import from {node.module}"
        if isinstance(node, ast.AsyncFunctionDef | ast.Await):
            return "the tests are asynchronous"
    return None


def _find_names(table: symtable.SymbolTable) -> tuple[set[str], set[str]]:
    """Global names that are read, and those that are bound."""
    used, bound = set(), set()
    is_module = table.get_type() == "module"
    for symbol in table.get_symbols():
        if not (is_module or symbol.is_global()):
            continue
        if symbol.is_referenced():
            used.add(symbol.get_name())
        if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace():
            bound.add(symbol.get_name())
    for child in table.get_children():
        inner_used, inner_bound = _find_names(child)
        used |= inner_used
        bound |= inner_bound
    return used, bound
