"""Imports run one way only, and the command's help stays light."""

import ast
import functools
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What each folder may import of ours: records stands under all, model_cards and serving are leaves, training and eval
# do not know each other.
ALLOWED = {
    "kernels": {"deepseek_kernels"},
    "modeling_deepseek": {"modeling_deepseek", "deepseek_kernels"},
    "records": {"deepseek_records", "modeling_deepseek"},
    "training": {"deepseek_training", "deepseek_records", "modeling_deepseek", "deepseek_kernels"},
    "eval": {"deepseek_eval", "deepseek_records", "modeling_deepseek", "deepseek_kernels"},
    "model_cards": {"deepseek_model_cards", "deepseek_records", "modeling_deepseek"},
    "serving": {"deepseek_serving", "deepseek_records", "modeling_deepseek", "deepseek_kernels"},
}
ALLOWED["cli"] = set().union(*ALLOWED.values()) | {"deepseek_cli"}
OURS = set().union(*ALLOWED.values())
FILES = sorted(path for folder in ALLOWED for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_packages(path: Path) -> set[str]:
    packages = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            packages.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            packages.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            first = node.args[0]
            if isinstance(first, ast.Constant):
                packages.add(first.value.split(".")[0])
    return packages


def test_no_reversed_arrow():
    reversed_ones = {path: imported_packages(path) & OURS - ALLOWED[path.relative_to(ROOT).parts[0]] for path in FILES}
    assert not {str(path): packages for path, packages in reversed_ones.items() if packages}


def has_strange_relative_import(path: Path) -> bool:
    relative = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.ImportFrom) and node.level > 0]
    if path.parent == ROOT / "modeling_deepseek":
        # save_pretrained follows `from .sibling import name` and nothing else.
        return not all(node.level == 1 and node.module and "." not in node.module for node in relative)
    return bool(relative)


def test_relative_imports_are_only_the_model_files_siblings():
    assert not [str(path) for path in FILES if has_strange_relative_import(path)]


def test_modeling_is_flat():
    assert not [path for path in (ROOT / "modeling_deepseek").rglob("*.py") if path.parent.name != "modeling_deepseek"]


def module_name(path: Path) -> str:
    folder, *parts = path.relative_to(ROOT).with_suffix("").parts
    package = {"modeling_deepseek": folder}.get(folder, f"deepseek_{folder}")
    return ".".join([package, *parts]).removesuffix(".__init__")


def imported_modules(path: Path, known: set[str]) -> set[str]:
    """The modules of ours that a file imports: at its top, under TYPE_CHECKING or inside a function."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module if node.level == 0 else f"{module_name(path.parent / '__init__.py')}.{node.module}"
            found.update([module, *(f"{module}.{alias.name}" for alias in node.names)])
    return found & known - {module_name(path)}


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """A path that comes back to where it began, by depth-first search; None if there is none."""
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str] | None:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return None
        found = next(filter(None, (visit(other, [*trail, module]) for other in sorted(graph[module]))), None)
        done.add(module)
        return found

    return next(filter(None, (visit(module, []) for module in graph)), None)


def test_a_cycle_is_found():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": set()}) is None
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_no_module_imports_one_that_imports_it():
    names = {module_name(path): path for path in FILES}
    # `cli/main.py` finds its subcommands by name, so that they are no imports of its own.
    assert find_cycle({name: imported_modules(path, set(names)) for name, path in names.items()}) is None


LIBRARIES = {"accelerate", "datasets", "evaluate", "huggingface_hub", "peft", "transformers", "trl"}


def names_bound(nodes: list[ast.stmt]) -> set[str]:
    """The names that statements import, define or assign, however deep they stand."""
    inside = [node for top in nodes for node in ast.walk(top)]
    imported = {
        alias.asname or alias.name for node in inside if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assigned = {node.id for node in inside if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return imported | assigned


def names_read(top: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(top) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def unbound_names(tree: ast.Module) -> set[str]:
    """The libraries' names that are unbound where a version has them not, and are used all the same.

    Known are a top-level ``try`` that binds another thing instead, or a name that some ``if`` asks for.
    """
    asked = {name for node in ast.walk(tree) if isinstance(node, ast.If) for name in names_read(node.test)}
    lost: set[str] = set()
    for node in tree.body:
        theirs = {
            alias.asname or alias.name
            for one in ast.walk(node)
            if isinstance(one, ast.ImportFrom) and (one.module or "").split(".")[0] in LIBRARIES
            for alias in one.names
        }
        if isinstance(node, ast.Try):
            instead = names_bound([one for handler in node.handlers for one in handler.body])
            lost |= set() if instead & asked else theirs - instead
        elif isinstance(node, ast.With) and "suppress" in ast.unparse(node.items[0]):
            lost |= theirs
    return names_read(tree) & lost


def test_an_unbound_name_is_found():
    suppressed = "with suppress(ImportError):\n    from transformers.new import _f\ndef g():\n    return _f()"
    tried = "try:\n    from transformers.new import A, f\nexcept ImportError:\n    A = None\n"
    assert unbound_names(ast.parse(suppressed)) == {"_f"}
    assert unbound_names(ast.parse(tried + "def g():\n    return f()")) == {"f"}
    assert unbound_names(ast.parse(tried + "if A is not None:\n    f()")) == set()


def test_what_a_version_may_lack_is_never_used_unasked():
    assert not {str(path): names for path in FILES if (names := unbound_names(tree_of(path)))}


STAGES = sorted(path for path in (ROOT / "training/stages").glob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_a_stage_is_one_function_that_calls_down(path):
    (main,) = [node for node in tree_of(path).body if isinstance(node, ast.FunctionDef) and node.name == path.stem]
    assert main.end_lineno - main.lineno + 1 <= 60
    modules = {module_name(other) for other in STAGES}
    assert not imported_modules(path, modules)
    rooms = [other for other in (ROOT / "training").rglob("*.py") if other.parent != path.parent]
    # The files straight under training/ are the stages' names of earlier versions.
    callers = [other for other in rooms if module_name(path) in imported_modules(other, modules)]
    assert all(other.parent == ROOT / "training" for other in callers)


def run_seconds(*command: str) -> float:
    """CPU seconds of a process: a busy machine makes it wait, not work."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_answers_within_a_second_of_the_interpreter():
    bare = min(run_seconds(sys.executable, "-c", "pass") for _ in range(3))
    helped = min(run_seconds(sys.executable, "-m", "deepseek_cli.main", "--help") for _ in range(3))
    assert helped - bare < 1.0


def test_help_imports_nothing_heavy():
    code = (
        "import sys, deepseek_cli.main as m; m.build_parser();"
        "print([n for n in ('torch', 'transformers', 'numpy', 'datasets', 'trl', 'triton') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
