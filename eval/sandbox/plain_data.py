"""The closed format in which values cross between a candidate's process and the one that tests it.

Called by ``candidate.py`` and ``tester.py``; standard library only. Exact builtin types cross by value: None, bool,
int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, range, the views of a dict, and from
the library deque, Decimal and Fraction. A subclass of one of them (Counter, namedtuple, IntEnum) crosses as what it
extends, because that is what it is equal to. What else the candidate has stays with it: only a number crosses, by
which it can be called.

Containers carry the numbers of their opening, so that two names of one list stay two names of one list, and a reply
can speak of the containers that came with its request. A value is written with its parts first to last and read
without recursion, so that no depth of nesting can exhaust the reader.

`Reader` trusts nothing. Whatever bytes it is given, it returns exact builtin values or raises `Invalid`.
"""

import builtins
import struct
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_BYTES = 64 << 20
MAX_DEPTH = 200
# Shorter texts are written again wherever they occur; longer ones once, so that a list of one text stays small.
_LONG_TEXT = 64

_SINGLETONS: dict[bytes, Any] = {b"N": None, b"T": True, b"F": False, b"E": Ellipsis, b"J": NotImplemented}
_SINGLETON_TAGS = {id(value): tag for tag, value in _SINGLETONS.items()}
_CONTAINERS: dict[type, bytes] = {list: b"L", tuple: b"t", dict: b"D", set: b"S", frozenset: b"Z", deque: b"Q"}
_MUTABLE = (list, dict, set, bytearray, deque)
# Types of Python's own cross by name, as an argument (`int`) or a result.
_TYPES = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}
_VIEWS = {type({}.keys()): b"k", type({}.values()): b"v", type({}.items()): b"m"}


class Invalid(Exception):
    """The bytes are not a value of this format."""


class Uncrossable(Exception):
    """A value has no form in which it could cross."""


class Writer:
    """Writes one message.

    Args:
        refer: Called with what cannot cross by value; returns a tag and a number. It raises `Uncrossable` to refuse.
        table: Containers that both sides know already, by their numbers.
    """

    def __init__(self, refer: Callable[[Any], tuple[bytes, int]], table: list[Any] | None = None):
        self.refer = refer
        self.table = list(table or [])  # Also keeps what is written alive, so that no address is used twice.
        self.numbers = {id(value): number for number, value in enumerate(self.table)}
        self.parts: list[bytes] = []

    def write(self, value: Any, depth: int = 0) -> None:
        """Append a value.

        Args:
            value: What to write.
            depth: Containers around it.

        Raises:
            Uncrossable: It is nested too deeply, or refused by `refer`.
        """
        kind = type(value)
        tag = _SINGLETON_TAGS.get(id(value))
        if tag is not None:
            self.parts.append(tag)
        elif kind is int:
            self._write_sized(b"i", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
        elif kind is float:
            # One NaN in two places is equal to itself inside lists.
            if value == value or not self._is_known(value):
                self.parts.append(b"f" + struct.pack("<d", value))
        elif kind is str:
            if len(value) < _LONG_TEXT or not self._is_known(value):
                self._write_sized(b"s" if len(value) < _LONG_TEXT else b"u", value.encode("utf-8", "surrogatepass"))
        elif kind in _CONTAINERS:
            self._write_container(value, kind, depth)
        else:
            self._write_rarer(value, kind, depth)

    def _write_sized(self, tag: bytes, data: bytes) -> None:
        self.parts.append(tag + struct.pack("<I", len(data)) + data)

    def _is_known(self, value: Any) -> bool:
        """Write a reference if the value was written before; else give it the next number."""
        number = self.numbers.get(id(value))
        if number is not None:
            self.parts.append(b"R" + struct.pack("<I", number))
            return True
        self.numbers[id(value)] = len(self.table)
        self.table.append(value)
        return False

    def _write_container(self, value: Any, kind: type, depth: int) -> None:
        if self._is_known(value):
            return
        if depth >= MAX_DEPTH:
            raise Uncrossable(f"a value nested more than {MAX_DEPTH} deep")
        # The base class' own iteration, whatever a subclass overrides.
        parts = list(dict.items(value)) if kind is dict else list(kind.__iter__(value))  # type: ignore[attr-defined]
        self.parts.append(_CONTAINERS[kind] + struct.pack("<I", len(parts)))
        for part in parts:
            if kind is dict:
                self.write(part[0], depth + 1)
                self.write(part[1], depth + 1)
            else:
                self.write(part, depth + 1)

    def _write_rarer(self, value: Any, kind: type, depth: int) -> None:
        if kind is bytes:
            self._write_sized(b"b", value)
        elif kind is bytearray:
            if not self._is_known(value):
                self._write_sized(b"y", bytes(value))
        elif kind is complex:
            self.parts.append(b"c" + struct.pack("<dd", value.real, value.imag))
        elif kind is range:
            self._write_parts(b"r", (value.start, value.stop, value.step), depth)
        elif kind is Decimal:
            self._write_sized(b"d", str(value).encode())
        elif kind is Fraction:
            self._write_parts(b"q", (value.numerator, value.denominator), depth)
        elif kind is type and value in _TYPES.values():
            self._write_sized(b"g", value.__name__.encode())
        elif kind in _VIEWS:
            pairs = value.mapping.copy() if type(value.mapping.copy()) is dict else dict(value.mapping)
            self._write_parts(_VIEWS[kind], (pairs,), depth)
        else:
            self._write_foreign(value, kind, depth)

    def _write_parts(self, tag: bytes, parts: tuple[Any, ...], depth: int) -> None:
        self.parts.append(tag)
        for part in parts:
            self.write(part, depth + 1)

    def _write_foreign(self, value: Any, kind: type, depth: int) -> None:
        """A subclass of a builtin type, as what it extends; else a number that stands for the object."""
        for base, convert in _CONVERSIONS:
            if isinstance(value, base) and issubclass(kind, base):
                if base in _CONTAINERS:
                    self._write_container(value, base, depth)
                else:
                    self.write(convert(value), depth)
                return
        tag, number = self.refer(value)
        self.parts.append(tag + struct.pack("<I", number))

    def finish(self) -> bytes:
        """Return the message.

        Raises:
            Uncrossable: It is too long.
        """
        data = b"".join(self.parts)
        if len(data) > MAX_BYTES:
            raise Uncrossable(f"more than {MAX_BYTES >> 20} MiB in one call")
        return data


# By the base class' own methods: a subclass may override all of them.
_CONVERSIONS: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (int, int.__int__), (float, float.__float__), (str, str.__str__), (complex, lambda v: complex.__add__(v, 0j)),
    (bytes, lambda v: memoryview(v).tobytes()), (bytearray, lambda v: bytearray(memoryview(v))),
    (tuple, tuple), (list, list), (dict, dict), (set, set), (frozenset, frozenset), (deque, deque),
    (Decimal, lambda v: Decimal(Decimal.__str__(v))), (Fraction, lambda v: Fraction(v.numerator, v.denominator)),
)  # fmt: skip


class Reader:
    """Reads one message.

    Args:
        data: The message's body.
        resolve: Called with a tag and a number for what did not cross by value; raises `Invalid` to refuse.
        table: Containers that both sides know already.
    """

    def __init__(self, data: bytes, resolve: Callable[[bytes, int], Any], table: list[Any] | None = None):
        self.data = data
        self.at = 0
        self.resolve = resolve
        self.table = list(table or [])

    def read(self) -> Any:
        """Return the one value that the message holds.

        Raises:
            Invalid: The bytes are anything else.
        """
        try:
            value = self._read_value()
        except (TypeError, ValueError, KeyError, ArithmeticError, struct.error) as error:
            # An unhashable key, half a character, a number that is none.
            raise Invalid(f"{type(error).__name__} in a reply") from None
        if self.at != len(self.data):
            raise Invalid("bytes behind the value")
        return value

    def _take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise Invalid("cut short")
        self.at += size
        return self.data[self.at - size : self.at]

    def _number(self) -> int:
        return int.from_bytes(self._take(4), "little")

    def _read_value(self) -> Any:
        frames: list[_Frame] = []
        while True:
            opened = self._open(self._take(1))
            if isinstance(opened, _Frame):
                frames.append(opened)
                if len(frames) > MAX_DEPTH + 2:
                    raise Invalid("nested too deeply")
                if opened.missing:
                    continue
            else:
                if not frames:
                    return opened
                frames[-1].add(opened)
            while not frames[-1].missing:
                frame = frames.pop()
                value = frame.close()
                if frame.number is not None:
                    self.table[frame.number] = value
                if not frames:
                    return value
                frames[-1].add(value)

    def _open(self, tag: bytes) -> Any:
        """A finished value, or the frame of one whose parts follow."""
        if tag in _SINGLETONS:
            return _SINGLETONS[tag]
        if tag == b"i":
            return int.from_bytes(self._take(self._number()), "little", signed=True)
        if tag == b"f":
            (value,) = struct.unpack("<d", self._take(8))
            return value if value == value else self._keep(value)
        if tag == b"s":
            return self._take(self._number()).decode("utf-8", "surrogatepass")
        if tag == b"R":
            return self._refer(self._number())
        if tag in _PARTS:
            return _Frame(tag, _PARTS[tag], None)
        if tag in _SIZED_CONTAINERS:
            size = self._number() * (2 if tag == b"D" else 1)
            if size > len(self.data) - self.at:
                raise Invalid("more parts than bytes")
            made = _SIZED_CONTAINERS[tag]
            self.table.append(_UNFINISHED if made is None else made())
            return _Frame(tag, size, len(self.table) - 1, self.table[-1])
        return self._open_rarer(tag)

    def _open_rarer(self, tag: bytes) -> Any:
        if tag == b"u":
            return self._keep(self._take(self._number()).decode("utf-8", "surrogatepass"))
        if tag == b"b":
            return self._take(self._number())
        if tag == b"y":
            return self._keep(bytearray(self._take(self._number())))
        if tag == b"c":
            return complex(*struct.unpack("<dd", self._take(16)))
        if tag == b"d":
            return Decimal(self._take(self._number()).decode("ascii"))
        if tag == b"g":
            return _TYPES[self._take(self._number()).decode("ascii")]
        if tag in (b"O", b"P"):
            return self.resolve(tag, self._number())
        raise Invalid("an unknown tag")

    def _keep(self, value: Any) -> Any:
        self.table.append(value)
        return value

    def _refer(self, number: int) -> Any:
        if number >= len(self.table) or self.table[number] is _UNFINISHED:
            raise Invalid("a reference to nothing")
        return self.table[number]


_UNFINISHED = object()
_SIZED_CONTAINERS: dict[bytes, Callable[[], Any] | None] = {
    b"L": list, b"D": dict, b"S": set, b"Q": deque, b"t": None, b"Z": None,
}  # fmt: skip
_PARTS = {b"r": 3, b"q": 2, b"k": 1, b"v": 1, b"m": 1}


class _Frame:
    """A container of which not all parts are read. Lists, dictionaries and sets exist already and are filled."""

    __slots__ = ("made", "missing", "number", "parts", "tag")

    def __init__(self, tag: bytes, missing: int, number: int | None, made: Any = None):
        self.tag = tag
        self.missing = missing
        self.number = number
        self.made = made
        self.parts: list[Any] = []

    def add(self, part: Any) -> None:
        self.parts.append(part)
        self.missing -= 1

    def close(self) -> Any:
        tag, parts, made = self.tag, self.parts, self.made
        if tag in (b"L", b"Q"):
            made.extend(parts)
        elif tag == b"S":
            made.update(parts)
        elif tag == b"D":
            made.update(zip(parts[::2], parts[1::2], strict=True))
        else:
            return _close_parts(tag, parts)
        return made


def _close_parts(tag: bytes, parts: list[Any]) -> Any:
    if tag == b"t":
        return tuple(parts)
    if tag == b"Z":
        return frozenset(parts)
    wanted = int if tag in (b"r", b"q") else dict
    if any(type(part) is not wanted for part in parts):
        raise Invalid("a part of another type")
    if tag == b"r":
        return range(*parts)
    if tag == b"q":
        return Fraction(*parts)
    return {b"k": dict.keys, b"v": dict.values, b"m": dict.items}[tag](parts[0])


def copy_contents(value: Any) -> Any:
    """Return a new container with the parts of a mutable one, None for anything else.

    Args:
        value: A member of a message's table.
    """
    return type(value)(value) if type(value) in _MUTABLE else None


def replace_contents(value: Any, contents: Any) -> None:
    """Give a mutable container the parts of another of its type.

    Args:
        value: The container, which keeps its identity.
        contents: What it shall hold.

    Raises:
        Invalid: The two are not of one mutable type.
    """
    if type(value) is not type(contents) or type(value) not in _MUTABLE:
        raise Invalid("contents of another type")
    value.clear()
    if isinstance(value, list | bytearray | deque):
        value.extend(contents)
    else:
        value.update(contents)
