"""Every function says what it takes and returns.

`make lint` checks the types themselves with mypy; this holds what mypy is told to pass over (the files with Triton
kernels), answers in a second, and holds mypy's settings.
"""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "modeling_deepseek", "records", "model_cards", "training", "eval", "serving", "cli")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
# Folders still to be annotated. This list may only shrink.
EXEMPT = ("eval/sandbox",)


def is_triton_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def unannotated(source: str) -> list[str]:
    """Names of functions with an argument or a result of no stated type."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_triton_kernel(node):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        arguments += [argument for argument in (node.args.vararg, node.args.kwarg) if argument]
        bare = [item.arg for item in arguments if item.annotation is None and item.arg not in ("self", "cls")]
        if bare or node.returns is None:
            found.append(f"{node.lineno} {node.name}({', '.join(bare)})")
    return found


def test_every_signature_is_annotated():
    bare = {}
    for path in FILES:
        name = str(path.relative_to(ROOT))
        found = unannotated(path.read_text(encoding="utf-8"))
        if found and not name.startswith(EXEMPT):
            bare[name] = found
    assert not bare


def test_exemptions_are_still_needed():
    for folder in EXEMPT:
        assert any(unannotated(path.read_text(encoding="utf-8")) for path in (ROOT / folder).rglob("*.py")), folder


# One line each, and what mypy calls the mistake.
MISTAKES = (
    ("def a(x): return x", "no-untyped-def"),
    ("def b(x: int): return x", "no-untyped-def"),
    ("def c(x: int, y) -> int: return x", "no-untyped-def"),
    ("def d(x: dict) -> None: ...", "type-arg"),
    ("def e(x: int) -> str: return x", "return-value"),
    ("def f(x: int) -> None: f('a')", "arg-type"),
)


def test_mypy_refuses_what_it_should(tmp_path):
    path = tmp_path / "sample.py"
    path.write_text("\n".join(code for code, _ in MISTAKES))
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    for line, (_, complaint) in enumerate(MISTAKES, start=1):
        assert any(f":{line}: " in said and f"[{complaint}]" in said for said in done.stdout.splitlines()), done.stdout
