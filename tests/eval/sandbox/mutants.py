"""Small changes to a correct program, of the kinds that models make. Called by ``test_verdicts.py``."""

import ast
import random

_SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.FloorDiv, ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.And: ast.Or, ast.Or: ast.And, ast.In: ast.NotIn, ast.Is: ast.IsNot,
}  # fmt: skip
_WRAPPERS = (
    "str({})",
    "list({})",
    "tuple({})",
    "iter([{}])",
    "[{}]",
    "({}) or None",
    "print({})",
    "float({})",
    "(yield {})",
)


class _Mutator(ast.NodeTransformer):
    """Changes one place: the one whose turn it is."""

    def __init__(self, target: int, generator: random.Random):
        self.target = target
        self.generator = generator
        self.place = -1

    def _is_it(self) -> bool:
        self.place += 1
        return self.place == self.target

    def visit_BinOp(self, node):
        self.generic_visit(node)
        if type(node.op) in _SWAPS and self._is_it():
            node.op = _SWAPS[type(node.op)]()
        return node

    visit_BoolOp = visit_AugAssign = visit_BinOp

    def visit_Compare(self, node):
        self.generic_visit(node)
        if type(node.ops[0]) in _SWAPS and self._is_it():
            node.ops[0] = _SWAPS[type(node.ops[0])]()
        return node

    def visit_Constant(self, node):
        if type(node.value) in (int, float) and self._is_it():
            return ast.copy_location(ast.Constant(node.value + self.generator.choice([-1, 1])), node)
        if type(node.value) is str and len(node.value) < 9 and self._is_it():
            return ast.copy_location(ast.Constant(node.value + "x"), node)
        return node

    def visit_Return(self, node):
        self.generic_visit(node)
        if node.value is not None and self._is_it():
            text = self.generator.choice(_WRAPPERS).format(ast.unparse(node.value))
            return ast.copy_location(ast.Return(ast.parse(text, mode="eval").body), node)
        return node

    def visit_If(self, node):
        self.generic_visit(node)
        if self._is_it():
            node.test = ast.copy_location(ast.UnaryOp(ast.Not(), node.test), node.test)
        return node

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Load) and self._is_it():
            return ast.copy_location(
                ast.Name(self.generator.choice(["None", "undefined_name", "len", "x"]), node.ctx), node
            )
        return node

    def visit_Expr(self, node):
        self.generic_visit(node)
        return ast.copy_location(ast.Pass(), node) if self._is_it() else node


def make_mutant(source: str, seed: int) -> str:
    """Return the program with one place changed.

    Args:
        source: A correct program.
        seed: Chooses the place and the change.
    """
    generator = random.Random(seed)
    counter = _Mutator(-1, generator)
    counter.visit(ast.parse(source))
    tree = _Mutator(generator.randrange(max(counter.place, 0) + 1), generator).visit(ast.parse(source))
    return ast.unparse(ast.fix_missing_locations(tree))


def cut(completion: str, seed: int) -> str:
    """Return a completion as a limit of tokens would leave it.

    Args:
        completion: The text.
        seed: Chooses the place.
    """
    return completion[: random.Random(seed).randrange(len(completion))]
