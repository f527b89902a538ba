"""Runs trusted tests against a candidate that lives in another process.

Called by ``judge.py`` in a process forked for the one program; standard library only. In the tests' namespace stands,
for every name that they take from the candidate, a `Remote`: calling it sends the arguments over the border and
rebuilds what comes back as exact builtin values. So an object that equals everything, a number that lies about its
difference, a patched ``math.isclose`` or ``abs`` stay on the other side.

What the candidate says about an object that did not cross (its length, its items, its attributes) is believed as much
as a value it returns. Equality with a value of the tests is not left to it, nor order, nor arithmetic.

A break of the protocol is remembered: a test that catches every exception does not pass because of it.
"""

import builtins
import importlib
import os
import select
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

from candidate import NONCE_BYTES
from plain_data import MAX_BYTES, Invalid, Reader, Uncrossable, Writer, replace_contents


class Broken(BaseException):
    """The candidate ended, or what it sent is not an answer. Not an `Exception`, so few tests catch it."""


class Border:
    """The tests' end of the channel.

    Args:
        channel: Connected to `CandidateServer`.
    """

    def __init__(self, channel: socket.socket):
        self.channel = channel
        self.broken: str | None = None
        self.uncrossable: str | None = None
        self.remotes: dict[int, Remote] = {}
        # The last exception that crossed, and what the candidate calls its type.
        self.last_error: tuple[BaseException | None, str] = (None, "")

    def await_start(self) -> None:
        """Wait until the candidate's process is set up.

        Raises:
            Broken: It is not.
        """
        if self._receive_message() != b"\0" * NONCE_BYTES:
            self._break("did not start")

    def load(self, source: str, imports: str, names: tuple[str, ...]) -> dict[str, Any]:
        """Run the candidate's source and return those of the names that it defines.

        Args:
            source: The candidate.
            imports: Import statements of the tests, which the candidate may rely on.
            names: What the tests take from it.
        """
        found = self.ask("load", None, source, imports, names)
        if type(found) is not dict or not set(found) <= set(names):
            self._break("answered a question with something else")
        for name, value in found.items():
            if value is NotImplemented and name in sys.stdlib_module_names:
                found[name] = importlib.import_module(name)
        return found

    def ask(self, operation: str, target: "Remote | None", *arguments: Any, **named: Any) -> Any:
        """Let the candidate do one thing; return its result or raise its exception.

        Args:
            operation: A key of ``candidate.py``'s operations.
            target: What to do it to.
            arguments: Arguments; the mutable ones show afterwards what the candidate did to them.
            named: Keyword arguments.

        Raises:
            Broken: What came back is not an answer.
            Uncrossable: An argument of the tests cannot cross.
        """
        if self.broken is not None:
            raise Broken(self.broken)
        request = Writer(self._refer)
        try:
            request.write((operation, target, arguments, named))
            body = request.finish()
        except Uncrossable as error:
            self.uncrossable = str(error)
            raise
        if select.select([self.channel], [], [], 0)[0]:
            self._break("spoke without being asked")
        nonce = os.urandom(NONCE_BYTES)
        self._send(nonce + body)
        reply = self._receive_message()
        if reply[:NONCE_BYTES] != nonce:
            self._break("answered another question")
        return self._take_reply(reply[NONCE_BYTES:], request.table)

    def _take_reply(self, body: bytes, table: list[Any]) -> Any:
        try:
            reply = Reader(body, self._resolve, table).read()
            if type(reply) is not tuple or len(reply) != 3 or type(reply[2]) is not tuple:
                raise Invalid("no reply")
            kind, value, updates = reply
            for update in updates:
                if type(update) is not tuple or len(update) != 2 or type(update[0]) is not int:
                    raise Invalid("no update")
                if not 0 <= update[0] < len(table):
                    raise Invalid("an update of nothing")
                replace_contents(table[update[0]], update[1])
            if kind == "value":
                return value
            if kind != "error" or type(value) is not tuple or [type(part) for part in value] != [str] * 3:
                raise Invalid("no reply")
            error = _rebuild_error(value[0], value[2])
        except (Invalid, MemoryError) as problem:
            self._break(f"sent no valid reply ({problem or type(problem).__name__})")
        self.last_error = (error, value[1])
        raise error

    def _refer(self, value: Any) -> tuple[bytes, int]:
        if type(value) is Remote:
            return b"P", object.__getattribute__(value, "_number")
        raise Uncrossable(f"the tests pass an object of type {type(value).__name__}")

    def _resolve(self, tag: bytes, number: int) -> "Remote":
        if tag != b"O":
            raise Invalid("an object of the tests")
        if number not in self.remotes:
            self.remotes[number] = Remote(self, number)
        return self.remotes[number]

    def _break(self, what: str) -> Any:
        self.broken = self.broken or what
        raise Broken(what)

    def _send(self, data: bytes) -> None:
        try:
            self.channel.sendall(struct.pack("<I", len(data)) + data)
        except OSError:
            self._break("ended")

    def _receive_message(self) -> bytes:
        size = int.from_bytes(self._receive(4), "little")
        if not NONCE_BYTES <= size <= MAX_BYTES + NONCE_BYTES:
            self._break("sent no valid reply (its length)")
        return self._receive(size)

    def _receive(self, size: int) -> bytes:
        chunks, missing = [], size
        while missing:
            try:
                chunk = self.channel.recv(min(missing, 1 << 20))
            except OSError:
                chunk = b""
            if not chunk:
                self._break("ended")
            chunks.append(chunk)
            missing -= len(chunk)
        return b"".join(chunks)


def _make_forward(operation: str) -> Callable[..., Any]:
    def forward(self: "Remote", *arguments: Any, **named: Any) -> Any:
        return object.__getattribute__(self, "_border").ask(operation, self, *arguments, **named)

    return forward


def _make_comparison(operation: str) -> Callable[..., Any]:
    """Between two of the candidate's objects it may decide; not between one of these and a value of the tests."""

    def compare(self: "Remote", other: Any) -> Any:
        if type(other) is not Remote:
            return NotImplemented
        result = object.__getattribute__(self, "_border").ask(operation, self, other)
        return result if type(result) is bool else NotImplemented

    return compare


def _make_exact(operation: str, kind: type) -> Callable[..., Any]:
    def forward(self: "Remote") -> Any:
        border = object.__getattribute__(self, "_border")
        result = border.ask(operation, self)
        if type(result) is not kind:
            border._break("answered a question with something else")
        return result

    return forward


class Remote:
    """An object that stays with the candidate: a function, an iterator, an instance of a class of its own."""

    __slots__ = ("_border", "_number")

    def __init__(self, border: Border, number: int):
        object.__setattr__(self, "_border", border)
        object.__setattr__(self, "_number", number)

    __call__ = _make_forward("call")
    __iter__ = _make_forward("iter")
    __next__ = _make_forward("next")
    __getitem__ = _make_forward("getitem")
    __setitem__ = _make_forward("setitem")
    __delitem__ = _make_forward("delitem")
    __len__ = _make_exact("len", int)
    __bool__ = _make_exact("bool", bool)
    __str__ = _make_exact("str", str)
    __repr__ = _make_exact("repr", str)
    __eq__ = _make_comparison("eq")
    __lt__, __le__ = _make_comparison("lt"), _make_comparison("le")
    __gt__, __ge__ = _make_comparison("gt"), _make_comparison("ge")
    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__doc__", "__dict__"):
            raise AttributeError(name)
        return object.__getattribute__(self, "_border").ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__getattribute__(self, "_border").ask("setattr", self, name, value)


def _rebuild_error(name: str, text: str) -> BaseException:
    kind = getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, BaseException)):
        raise Invalid("an unknown exception")
    # Some (UnicodeDecodeError, ExceptionGroup) cannot be made from a text; the class above them can.
    for base in kind.__mro__:
        try:
            return base(text)
        except TypeError:
            continue
    raise Invalid("an exception that cannot be made")


def run_tests(channel: socket.socket, judge: int, request: dict[str, Any]) -> None:
    """Run the tests and tell the judge how they ended.

    Args:
        channel: Connected to the candidate.
        judge: The handle to write to: ``ready`` once all is set up, then a word and a text.
        request: ``candidate``, ``tests``, ``imports`` and ``names``.
    """
    border = Border(channel)
    namespace: dict[str, Any] = {}
    try:
        border.await_start()
        os.write(judge, b"ready")
        names = tuple(request["names"])
        namespace.update(border.load(request["candidate"] + "\n", request["imports"], names))
        exec(compile(request["tests"], "<string>", "exec", dont_inherit=True), namespace)
        border.ask("end", None)  # The candidate must still be there, and silent.
        verdict = ("passed", "")
    except BaseException as error:
        last, name = border.last_error
        verdict = ("failed", name if error is last else type(error).__name__)
    if border.uncrossable:
        verdict = ("uncrossable", border.uncrossable)
    if border.broken:
        verdict = ("broken", border.broken)
    os.write(judge, f"{verdict[0]} {verdict[1]}".encode("utf-8", "replace")[:1000])
