"""The candidate's side of the border: it loads a candidate's source and answers calls to what that defines.

Called by ``program.py`` at the end of its set-up, in the candidate's own process. Standard library only.
Nothing here is trusted by anybody. The candidate shares this process and may rewrite all of it; what it can make the
other side believe is bounded by ``plain_data.py``.
"""

import builtins
import contextlib
import operator
import os
import struct
import types
from collections.abc import Callable
from typing import Any

from plain_data import Reader, Uncrossable, Writer, copy_contents

_MAX_TEXT = 2000
NONCE_BYTES = 16


def _call(target: Any, *arguments: Any, **named: Any) -> Any:
    return target(*arguments, **named)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": _call, "iter": iter, "next": next, "len": len, "bool": bool, "str": str, "repr": repr, "getattr": getattr,
    "setattr": setattr, "getitem": operator.getitem, "setitem": operator.setitem, "delitem": operator.delitem,
    "eq": operator.eq, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip


class CandidateServer:
    """Answers requests about one candidate until the other side is done.

    Args:
        channel: The handle to talk over.
        as_main: Load the candidate as ``__main__``.
    """

    def __init__(self, channel: int, as_main: bool = False):
        self.channel = channel
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}
        # The references run a program in an empty namespace, where __name__ is "builtins".
        self.namespace: dict[str, Any] = {"__name__": "__main__"} if as_main else {}
        self.owner = os.getpid()
        os.register_at_fork(after_in_child=self._close_in_child)

    def _close_in_child(self) -> None:
        os.close(self.channel)

    def serve(self) -> None:
        """Answer until the other side closes the channel."""
        self._send(b"\0" * NONCE_BYTES)
        while True:
            (size,) = struct.unpack("<I", self._receive(4))
            nonce, body = self._receive(NONCE_BYTES), self._receive(size - NONCE_BYTES)
            reply = self._answer(body)
            if os.getpid() != self.owner:
                os._exit(0)  # A child the candidate forked came back; the call is its parent's to answer.
            self._send(nonce + reply)

    def _answer(self, body: bytes) -> bytes:
        reader = Reader(body, self._resolve)
        request = reader.read()
        operation, target, arguments, named = request
        table = reader.table
        reply: tuple[str, Any]
        try:
            if operation == "load":
                reply = ("value", self._load(*arguments))
            elif operation == "end":
                reply = ("value", None)
            else:
                reply = ("value", _OPERATIONS[operation](target, *arguments, **named))
        except BaseException as error:
            reply = ("error", _describe(error))
        try:
            return self._write(table, (*reply, self._find_updates(request, body, table)))
        except (Uncrossable, RecursionError) as error:
            return self._write(table, ("error", ("RuntimeError", type(error).__name__, str(error)), ()))

    def _find_updates(self, request: Any, body: bytes, table: list[Any]) -> tuple[Any, ...]:
        """What the request's mutable containers hold now, if that has changed."""
        again = Writer(self._refer)
        again.write(request)
        if again.finish() == body:
            return ()
        contents = ((number, copy_contents(value)) for number, value in enumerate(table))
        return tuple(pair for pair in contents if pair[1] is not None)

    def _write(self, table: list[Any], reply: tuple[Any, ...]) -> bytes:
        writer = Writer(self._refer, table)
        writer.write(reply)
        return writer.finish()

    def _load(self, source: str, imports: str, names: tuple[str, ...]) -> dict[str, Any]:
        exec(compile(source, "<string>", "exec", dont_inherit=True), self.namespace)
        # In one file the imports of the tests would serve the candidate as well, by the time it is called.
        with contextlib.suppress(ImportError):
            exec(imports, self.namespace)
        found = {name: self.namespace[name] for name in names if name in self.namespace}
        return {name: _describe_module(value) for name, value in found.items()}

    def _refer(self, value: Any) -> tuple[bytes, int]:
        number = self.numbers.get(id(value))
        if number is None:
            number = self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return b"O", number

    def _resolve(self, tag: bytes, number: int) -> Any:
        return self.objects[number]

    def _send(self, data: bytes) -> None:
        view = memoryview(struct.pack("<I", len(data)) + data)
        while view:
            view = view[os.write(self.channel, view) :]

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = os.read(self.channel, size - len(data))
            if not chunk:
                os._exit(0)
            data += chunk
        return data


def _describe_module(value: Any) -> Any:
    """A module crosses by its name, marked by a type that no other name of a candidate has."""
    return NotImplemented if isinstance(value, types.ModuleType) else value


def _describe(error: BaseException) -> tuple[str, str, str]:
    """The nearest builtin type, the type's own name, and the text."""
    kinds = [kind for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind]
    try:
        argument = error.args[0] if len(error.args) == 1 else None
        text = argument if type(argument) is str else str(error)
    except Exception:
        text = ""
    return kinds[0].__name__, str(type(error).__name__)[:200], str(text)[:_MAX_TEXT]
