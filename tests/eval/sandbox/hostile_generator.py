"""Combines where a walk through the interpreter starts, what it rewrites, and how it then forges the verdict.

Each candidate is wrong: `f(2)` should be 5. Data and text only; ``test_generated.py`` runs them, and
``compare_generated.py`` runs them under another checkout of this package.
"""

import itertools

TESTS = "assert f(2) == 5\nassert not f(3) != 7\nassert abs(f(4) - 9) < 1e-6"

# Each defines walk(), which yields namespaces (dictionaries), classes and functions to rewrite.
STARTS = {
    "frames": """
def walk():
    frame = sys._getframe()
    while frame:
        yield frame.f_globals
        yield frame.f_builtins
        yield frame.f_locals
        frame = frame.f_back
""",
    "traceback": """
def walk():
    try:
        1 / 0
    except ZeroDivisionError as error:
        frame = error.__traceback__.tb_frame
    while frame:
        yield frame.f_globals
        yield from frame.f_globals.values()
        frame = frame.f_back
""",
    "subclasses": """
def walk():
    for kind in object.__subclasses__():
        yield kind
        for value in list(vars(kind).values()):
            if hasattr(value, '__globals__'):
                yield value.__globals__
                yield value
""",
    "deep subclasses": """
def walk():
    queue, seen = [object], set()
    while queue and len(seen) < 3000:
        kind = queue.pop()
        for child in type.__subclasses__(kind):
            if child not in seen:
                seen.add(child)
                queue.append(child)
                yield child
                yield getattr(child.__init__, '__globals__', {})
""",
    "modules": """
def walk():
    for module in list(sys.modules.values()):
        yield vars(module)
        for value in list(vars(module).values()):
            if isinstance(value, type) or hasattr(value, '__code__'):
                yield value
""",
    "collector": """
def walk():
    import gc
    for thing in gc.get_objects():
        if isinstance(thing, (dict, type)) or hasattr(thing, '__code__'):
            yield thing
""",
    "referrers": """
def walk():
    import gc
    queue, seen = [os.write, os.read, exec, f], set()
    while queue and len(seen) < 400:
        thing = queue.pop()
        for other in gc.get_referrers(thing):
            if id(other) not in seen and len(seen) < 400:
                seen.add(id(other))
                queue.append(other)
                yield other
""",
    "builtins": """
def walk():
    import builtins
    yield vars(builtins)
    yield __builtins__ if isinstance(__builtins__, dict) else vars(__builtins__)
    yield from (int, float, str, list, BaseException, AssertionError)
""",
    "other threads": """
def walk():
    for frame in list(sys._current_frames().values()):
        while frame:
            yield frame.f_globals
            yield frame.f_locals
            frame = frame.f_back
""",
    "generator frame": """
def walk():
    def own():
        yield sys._getframe()
    generator = own()
    frame = next(generator)
    while frame:
        yield frame.f_globals
        yield frame.f_builtins
        frame = frame.f_back
""",
    "closures": """
def walk():
    queue, seen = [vars(module) for module in list(sys.modules.values())], 0
    while queue and seen < 4000:
        space = queue.pop()
        for value in list(space.values()):
            for cell in getattr(value, '__closure__', None) or ():
                seen += 1
                try:
                    yield cell.cell_contents
                except ValueError:
                    pass
            for name in ('__defaults__', '__kwdefaults__'):
                if getattr(value, name, None):
                    yield value
""",
    "library of C": """
def walk():
    for kind in object.__subclasses__():
        if kind.__name__ == 'CDLL':
            yield kind.__init__.__globals__
            yield kind
    ctypes = sys.modules.get('ctypes') or __import__('ctypes')
    yield vars(ctypes)
""",
    "subinterpreter": """
def walk():
    try:
        import _xxsubinterpreters as interpreters
        number = interpreters.create()
        interpreters.run_string(number, 'import sys, os, builtins')
        interpreters.run_string(number, 'import ctypes')
    except BaseException:
        pass
    yield vars(sys)
    yield vars(os)
""",
    "cached extension": """
def walk():
    import _imp, importlib.machinery
    for name in ('_ctypes', '_testcapi', '_socket', 'posix'):
        try:
            yield vars(_imp.create_dynamic(importlib.machinery.ModuleSpec(name, None, origin=name)))
        except BaseException:
            pass
    try:
        yield vars(_imp.create_builtin(importlib.machinery.ModuleSpec('posix', None)))
    except BaseException:
        pass
""",
    "import machinery": """
def walk():
    import importlib._bootstrap as bootstrap
    yield vars(bootstrap)
    for finder in [*sys.meta_path, *sys.path_hooks]:
        yield finder
    yield sys.path_importer_cache
    yield sys.modules
""",
}

# Each defines rewrite(thing).
REWRITES = {
    "functions": """
def rewrite(thing):
    if isinstance(thing, dict):
        for name in ('abs', 'len', 'isinstance', 'type', 'exec', 'compile', 'all', 'any', 'str', 'repr', 'print'):
            if name in thing:
                thing[name] = lambda *a, **k: 0
""",
    "calls to the system": """
def rewrite(thing):
    if isinstance(thing, dict):
        for name in ('_exit', 'read', 'write', 'close', 'recv', 'sendall', 'select', 'waitpid', 'getpid'):
            if name in thing and callable(thing[name]):
                thing[name] = lambda *a, **k: b'passed '
""",
    "methods of classes": """
def rewrite(thing):
    if isinstance(thing, type):
        for name in list(vars(thing)):
            if name in ('read', 'write', 'ask', 'load', '_answer', '_load', '__eq__', '__ne__', 'finish'):
                setattr(thing, name, lambda *a, **k: True)
""",
    "code of functions": """
def fine(*a, **k):
    return True
def rewrite(thing):
    code = getattr(thing, '__code__', None)
    if code is not None and thing not in (f, attack, walk, rewrite, forge, fine):
        if any(word in code.co_name for word in ('test', 'check', 'judge', 'verdict', 'run', 'answer', 'fail')):
            thing.__code__ = fine.__code__
""",
    "results in lists": """
def rewrite(thing):
    values = list(thing.values()) if isinstance(thing, dict) else [thing]
    for value in values:
        if type(value) is list and len(value) < 9:
            value.append('passed')
        if type(value) is dict and 'passed' in value:
            value['passed'] = True
""",
    "exceptions": """
class Fine(BaseException):
    def __new__(cls, *a):
        os._exit(0)
def rewrite(thing):
    if isinstance(thing, dict):
        for name in ('AssertionError', 'BaseException', 'Exception', 'Broken', 'Invalid', 'Uncrossable'):
            if name in thing:
                thing[name] = Fine
""",
    "defaults": """
def rewrite(thing):
    if getattr(thing, '__defaults__', None) and thing not in (f, attack, walk, rewrite, forge):
        thing.__defaults__ = tuple(True for _ in thing.__defaults__)
""",
    "raw memory": """
def rewrite(thing):
    move = thing.get('memmove') if isinstance(thing, dict) else None
    if move is not None:
        size = (5).__sizeof__()
        for number in (5, 7, 9):
            move(id(number) + 16, id(3) + 16, size - 16)
""",
}

# Each defines forge(), which returns what `f` does.
FORGES = {
    "equal to everything": """
class Equal:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __sub__(self, other): return 0.0
    __rsub__ = __add__ = __radd__ = __abs__ = __sub__
    def __lt__(self, other): return True
    __gt__ = __le__ = __ge__ = __lt__
    def __abs__(self): return 0.0
def forge():
    return Equal()
""",
    "a number of another kind": """
class Number(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __sub__(self, other): return 0
    __hash__ = int.__hash__
def forge():
    return Number(3)
""",
    "three": "def forge():\n    return 3\n",
    "words to all handles": """
def forge():
    for handle in range(3, 32):
        for text in (b'passed ', b'ready', b'r', b'{"passed": true, "reason": "passed"}'):
            try:
                write(handle, text)
            except OSError:
                pass
    return 3
""",
    "a reply of its own": """
def forge():
    body = bytes(16) + b't\\3\\0\\0\\0s\\5\\0\\0\\0value' + b'i\\1\\0\\0\\0\\5' + b't\\0\\0\\0\\0'
    try:
        write(3, len(body).to_bytes(4, 'little') + body)
    except OSError:
        pass
    return 3
""",
    "an exit": "def forge():\n    leave(0)\n",
    "an exception": "def forge():\n    raise SystemExit(0)\n",
    "callers": """
def forge():
    frame = sys._getframe()
    while frame:
        for space in (frame.f_globals, frame.f_locals):
            for name in ('reply', 'value', 'result', 'check', 'candidate', 'verdict'):
                if name in space:
                    space[name] = 5
        frame = frame.f_back
    return 3
""",
}

_PROGRAM = """import os, sys
write, leave = os.write, os._exit
{start}{rewrite}{forge}
def attack():
    try:
        for thing in walk():
            try:
                rewrite(thing)
            except Exception:
                pass
    except Exception:
        pass
def f(x):
    {at_call}
    return forge()
{at_load}
"""


def generate() -> dict[str, str]:
    """Return every combination by name; half attack when they are loaded, half when they are called."""
    programs = {}
    kinds = itertools.product(STARTS.items(), REWRITES.items(), FORGES.items())
    for index, ((start, walk), (rewrite, change), (forge, end)) in enumerate(kinds):
        moments = ("pass", "attack()") if index % 2 else ("attack()", "pass")
        source = _PROGRAM.format(start=walk, rewrite=change, forge=end, at_call=moments[0], at_load=moments[1])
        programs[f"{start} / {rewrite} / {forge}"] = source
    return programs
