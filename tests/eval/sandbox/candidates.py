"""Candidates with the tests they are judged by: honest ones, ones that need one process, and ones that forge. Data."""

# Each pair passes in one program, and must in two.
AGREES = {
    "values": (
        "def f(x): return x",
        r"""
for v in (None, True, 0, -1, 1 << 200, -(1 << 63), 1.5, -0.0, 1e999, '', 'a\ud800', b'x', 2j, (), [], {}, ...,
          set(), frozenset([1]), range(3), {1: [2]}, bytearray(b'x'), [(), [[]]], int, ValueError):
    assert f(v) == v and type(f(v)) is type(v), v
assert str(f(-0.0)) == '-0.0' and f(float('nan')) != f(float('nan'))
assert f(True) is True
""",
    ),
    "keyword arguments": (
        "def f(a, *b, c=1, **d): return a, b, c, d",
        "assert f(1, 2, c=3, e=4) == (1, (2,), 3, {'e': 4})",
    ),
    "mutated arguments": (
        r"""
def f(a, b, c, d):
    a.append(1); b['x'] = a; c.add(2); d.extend(b'y'); a.sort()
""",
        r"""
a, b, c, d = [3], {}, {1}, bytearray(b'x')
f(a, b, c, d)
assert a == [1, 3] and b['x'] is a and c == {1, 2} and d == bytearray(b'xy')
""",
    ),
    "mutated inside": (
        "def f(x): x[0][0].append(1)",
        r"""
x = [([],)]
y = x[0][0]
f(x)
assert y == [1] and x[0][0] is y
""",
    ),
    "argument returned": (
        r"""
def f(x):
    x.reverse()
    return x
""",
        r"""
x = [1, 2]
assert f(x) is x and x == [2, 1]
""",
    ),
    "mutated before an error": (
        r"""
def f(x):
    x.append(1)
    raise KeyError('k')
""",
        r"""
x = []
try:
    f(x)
except KeyError as error:
    assert error.args == ('k',)
else:
    assert False
assert x == [1]
""",
    ),
    "aliases": (
        r"""
def f(a, b):
    a.append(1)
    return a is b
""",
        r"""
x = []
assert f(x, x) and x == [1]
assert not f([], [])
""",
    ),
    "cycle": (
        r"""
def f(x):
    x.append(x)
    return x
""",
        r"""
y = f([])
assert y[0] is y
""",
    ),
    "one nan": (
        "def f(x): return [x]",
        r"""
x = float('nan')
assert f(x) == [x]
""",
    ),
    "default argument": (
        r"""
def f(x, kept=[]):
    kept.append(x)
    return kept
""",
        r"""
f(1)
assert f(2) == [1, 2]
""",
    ),
    "subclasses": (
        r"""
from collections import *
from enum import IntEnum
class E(IntEnum):
    A = 1
class S(str): pass
P = namedtuple('P', 'x y')
d = defaultdict(list)
d[1].append(2)
def f(): return Counter('aab'), OrderedDict(a=1), d, P(1, 2), E.A, S('x'), deque([1])
""",
        r"""
assert f() == ({'a': 2, 'b': 1}, {'a': 1}, {1: [2]}, (1, 2), 1, 'x', deque([1]))
""",
    ),
    "views": (
        "def f(d): return d.keys(), d.items()",
        r"""
assert f({1: 2}) == ({1}, {(1, 2)})
assert f({1: 2})[0] == {1: 3}.keys()
""",
    ),
    "numbers of the library": (
        r"""
from decimal import Decimal
from fractions import Fraction
def f(): return Decimal('1.5'), Fraction(3, 2)
""",
        "assert f() == (1.5, 1.5) and f()[0] * 2 == 3",
    ),
    "generator": (
        r"""
def f(n):
    yield from range(n)
""",
        r"""
assert list(f(3)) == [0, 1, 2]
assert sum(f(4)) == 6
assert next(f(1)) == 0
""",
    ),
    "generator as an argument": (
        r"""
def f(): yield 1
def g(x): return list(x)
""",
        "assert g(f()) == [1]",
    ),
    "map and zip": (
        "def f(x): return map(str, x)",
        r"""
assert list(f([1, 2])) == ['1', '2']
assert f([1]) != ['1']
""",
    ),
    "closure": (
        "def f(a): return lambda b: a + b",
        "assert f(1)(2) == 3 and callable(f)",
    ),
    "instances": (
        r"""
class Node:
    def __init__(self, v): self.v, self.left = v, None
    def __len__(self): return 1
def depth(n): return 0 if n is None else 1 + depth(n.left)
""",
        r"""
r = Node(1)
r.left = Node(2)
r.left.left = Node(3)
assert depth(r) == 3 and r.left.v == 2 and len(r) == 1
""",
    ),
    "instances that compare": (
        r"""
from dataclasses import dataclass
@dataclass(order=True)
class P:
    x: int
""",
        r"""
assert P(1) == P(1) and P(1) < P(2) and P(1) != P(2) and P(1) != 1 and str(P(1)) == 'P(x=1)'
""",
    ),
    "container of its own": (
        r"""
class Bag:
    def __init__(self): self.d = {}
    def __getitem__(self, k): return self.d[k]
    def __setitem__(self, k, v): self.d[k] = v
    def __iter__(self): return iter(self.d)
""",
        r"""
b = Bag()
b['x'] = 1
assert b['x'] == 1 and list(b) == ['x'] and 'x' in b
""",
    ),
    "errors": (
        r"""
class Mine(ValueError): pass
def f(x):
    if x: raise Mine('text')
    return 1 / 0
""",
        r"""
for x, kind in ((1, ValueError), (0, ZeroDivisionError)):
    try:
        f(x)
    except kind as error:
        assert str(error) in ('text', 'division by zero')
    else:
        assert False
""",
    ),
    "an error without a plain maker": (
        r"""
def f(): return b'\xff'.decode()
""",
        r"""
try:
    f()
except ValueError:
    pass
else:
    assert False
""",
    ),
    "a name of Python's": (
        "def sum(a, b): return a + b",
        "assert sum(1, 2) == 3",
    ),
    "imports of the tests": (
        "def f(x): return math.sqrt(x)",
        r"""
import math
assert f(4) == 2
""",
    ),
    "modules of the candidate": (
        r"""
import math
def f(): return 1.0
""",
        "assert math.isclose(f(), 1.0)",
    ),
    "constants of the candidate": (
        "LIMIT = [1, 2]",
        "assert LIMIT == [1, 2]",
    ),
    "line continued at the end": (
        r"""
def f(): return 1\
""",
        "assert f() == 1",
    ),
    "recursion": (
        "def f(n): return n and 1 + f(n - 1)",
        "assert f(900) == 900",
    ),
    "doctest": (
        r"""
import doctest
def f():
    '''>>> f()
    1'''
    return doctest.testmod().failed
""",
        "assert f() == 0",
    ),
    "ctypes": (
        r"""
import ctypes
def f(x): return ctypes.c_int32(x).value
""",
        "assert f(1 << 31) == -(1 << 31)",
    ),
    "the heap": (
        r"""
import gc
def f(): return len(gc.get_objects()) > 9
""",
        "assert f()",
    ),
    "profiler": (
        r"""
import cProfile
def f(): return cProfile.Profile().runcall(len, [1])
""",
        "assert f() == 1",
    ),
    "trace": (
        r"""
import sys
def f():
    sys.settrace(lambda *a: None)
    sys.settrace(None)
    return 1
""",
        "assert f() == 1",
    ),
    "thread left running": (
        r"""
import threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
def f(): return 1
""",
        "assert f() == 1",
    ),
    "child that returns": (
        r"""
import os
def f():
    if os.fork() == 0:
        return 2
    os.wait()
    return 1
""",
        "assert f() == 1",
    ),
}

# What must run in one program, because the tests reach for what two processes do not share.
SHARED = {
    "callable argument": (
        "def f(g): return g(2)",
        "assert f(lambda x: x + 1) == 3",
    ),
    "iterator argument": (
        "def f(x): return list(x)",
        "assert f(iter([1])) == [1]",
    ),
    "class of the tests": (
        "def f(x): return x.v",
        r"""
class A:
    v = 1
assert f(A()) == 1
""",
    ),
    "output": (
        "def f(): print('x', end='')",
        r"""
import io, contextlib
with contextlib.redirect_stdout(io.StringIO()) as s:
    f()
assert s.getvalue() == 'x'
""",
    ),
    "seed": (
        r"""
import random
def f(): return random.random()
""",
        r"""
import random
random.seed(1)
a = f()
random.seed(1)
assert a == f()
""",
    ),
    "namespace": (
        "def f(): return 1",
        "assert globals()['f']() == 1",
    ),
    "half a program": (
        "def f():",
        r"""
    return 1
assert f() == 1
""",
    ),
}

# Each would pass, or has a fair chance to, where candidate and tests share an interpreter.
FORGED = {
    "equal to everything": (
        r"""
class E:
    def __eq__(self, other): return True
def f(): return E()
""",
        "assert f() == 3",
    ),
    "unequal to nothing": (
        r"""
class E:
    def __ne__(self, other): return False
def f(): return E()
""",
        "assert not f() != 3",
    ),
    "a text that equals": (
        r"""
class E(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def f(): return E('x')
""",
        "assert f() == 'y'",
    ),
    "a number that lies": (
        r"""
class E(float):
    def __sub__(self, other): return 0.0
    __rsub__ = __sub__
def f(): return E(1)
""",
        "assert abs(f() - 2.5) < 1e-6",
    ),
    "no number that lies": (
        r"""
class E:
    def __sub__(self, other): return 0.0
    __rsub__ = __sub__
def f(): return E()
""",
        "assert abs(f() - 2.5) < 1e-6",
    ),
    "larger than everything": (
        r"""
class E:
    def __gt__(self, other): return True
    def __lt__(self, other): return True
def f(): return E()
""",
        "assert f() > 3",
    ),
    "contains everything": (
        r"""
class E:
    def __contains__(self, other): return True
    def __iter__(self): return iter(())
def f(): return E()
""",
        "assert 3 in f()",
    ),
    "a patched module": (
        r"""
import math
math.isclose = lambda *a, **k: True
def f(): return 1.0
""",
        r"""
import math
assert math.isclose(f(), 2.0)
""",
    ),
    "a patched module of the candidate": (
        r"""
import math
math.isclose = lambda *a, **k: True
def f(): return 1.0
""",
        "assert math.isclose(f(), 2.0)",
    ),
    "a false module": (
        r"""
class math:
    isclose = staticmethod(lambda *a, **k: True)
def f(): return 1
""",
        r"""
import math
assert math.isclose(f(), 2)
""",
    ),
    "a patched builtin": (
        r"""
import builtins
abs = builtins.abs = lambda x: 0
def f(): return 1
""",
        "assert abs(f() - 3) < 1e-6",
    ),
    "a check of its own": (
        r"""
def check(f): pass
def f(): return 1
""",
        r"""
def check(f):
    assert f() == 2
check(f)
""",
    ),
    "a decorator left open": (
        r"""
def f(): return 1
@lambda f: lambda *a: None
""",
        r"""
def check(f):
    assert f() == 2
check(f)
""",
    ),
    "a text left open": (
        r"""
def f(): return 1
'''
""",
        "assert f() == 2 # '''",
    ),
    "the end from inside": (
        r"""
import os
def f(): os._exit(0)
""",
        r"""
f()
assert False
""",
    ),
    "the end while loading": (
        "raise SystemExit(0)",
        "pass",
    ),
    "the end by a thread": (
        r"""
import os, threading, time
threading.Thread(target=lambda: (time.sleep(.2), os._exit(0))).start()
def f(): time.sleep(1)
""",
        r"""
try:
    f()
except:
    pass
""",
    ),
    "an answer without a question": (
        r"""
import os
os.write(3, b'x' * 100)
def f(): return 1
""",
        "assert f() == 1",
    ),
    "an answer and silence": (
        r"""
import os
def f():
    os.write(3, (20).to_bytes(4, 'little') + b'x' * 20)
    return 1
""",
        r"""
try:
    f()
except BaseException:
    pass
""",
    ),
    "a huge answer": (
        r"""
import os
def f():
    os.write(3, b'\xff' * 4)
    return 1
""",
        r"""
try:
    f()
except BaseException:
    pass
""",
    ),
    "silence": (
        r"""
import os
def f():
    os.close(3)
""",
        r"""
try:
    f()
except BaseException:
    pass
""",
    ),
    "another name's answer": (
        r"""
import sys
for m in list(sys.modules.values()):
    for n in list(vars(m)):
        if n == 'CandidateServer': m.CandidateServer._load = lambda *a: {'assert': 1}
def f(): return 1
""",
        "assert f() == 2",
    ),
    "a wrong value": (
        "def f(): return 1",
        "assert f() == 2",
    ),
    "no such name": (
        "def g(): return 1",
        "assert f() == 1",
    ),
    "an endless text": (
        r"""
def f():
    return 'x' * (1 << 29)
""",
        r"""
try:
    f()
except Exception:
    pass
assert f()
""",
    ),
}
