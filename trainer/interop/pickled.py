"""Parses a pickle without looking up, calling or building anything: its instructions are followed on plain data.

A class or function that a pickle names becomes a `Named`, a call becomes a `Made`. The caller says which names may occur; any
other is refused before anything is made of the rest.
"""

from __future__ import annotations

import pickletools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Named:
    """A class or function by its name, such as `torch.float32`."""

    kind: str


@dataclass(eq=False)
class Made:
    """What a call of `kind` with these arguments would return, and the state that it would be given."""

    kind: str
    args: tuple[Any, ...]
    state: Any = None


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_LITERALS = (
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING",
)  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


def read_pickle(data: bytes, names: Collection[str]) -> Any:
    """Returns the object of a pickle of protocol 2 to 5: dicts, lists, tuples, numbers, strings, `Named` and `Made`.

    Raises ValueError for any other name and for what is not such a pickle. The message has nothing of the content but names.

    names: the classes and functions that may occur, as `module.name`.
    """
    reader = _Reader(names)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return reader.pop()
            reader.follow(opcode.name, argument)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, UnicodeError) as error:
        raise ValueError(f"no sound pickle ({type(error).__name__})") from None
    raise ValueError("no sound pickle: it has no end")


class _Reader:
    def __init__(self, names: Collection[str]) -> None:
        self.names = names
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        top = self.stack.pop()
        if top is _MARK:
            raise ValueError("no sound pickle: a mark where there should be a value")
        return top

    def to_mark(self) -> list[Any]:
        """What lies above the last mark, both taken off."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("no sound pickle: a mark is missing")
        above = self.stack[at + 1 :]
        del self.stack[at:]
        return above

    def follow(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack.append(tuple([self.pop() for _ in range(count)][::-1]))
        elif name == "TUPLE":
            stack.append(tuple(self.to_mark()))
        elif name not in ("PROTO", "FRAME"):
            self.follow_object(name, argument)

    def follow_object(self, name: str, argument: Any) -> None:
        """The instructions that fill containers and make objects."""
        stack = self.stack
        if name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [self.pop()] if name == "APPEND" else self.to_mark()
            self._add(stack[-1], items)
        elif name in ("SETITEM", "SETITEMS"):
            pairs = [self.pop(), self.pop()][::-1] if name == "SETITEM" else self.to_mark()
            self._set(stack[-1], pairs)
        elif name == "GLOBAL":
            stack.append(self._named(*argument.split(" ")))
        elif name == "STACK_GLOBAL":
            last, first = self.pop(), self.pop()
            stack.append(self._named(first, last))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, kind = self.pop(), self.pop()
            if not isinstance(kind, Named) or not isinstance(arguments, tuple):
                raise ValueError("no sound pickle: a call of what is no name")
            # An empty ordered dict is filled by the instructions that follow.
            ordered = kind.kind == "collections.OrderedDict" and not arguments
            stack.append({} if ordered else Made(kind.kind, arguments))
        elif name == "BUILD":
            state, made = self.pop(), stack[-1]
            if isinstance(made, Made):
                made.state = state
            elif not isinstance(made, dict):
                raise ValueError("no sound pickle: a state for what has none")
        elif name == "BINPERSID":
            stack.append(Made("persistent", (self.pop(),)))
        else:
            raise ValueError(f"the instruction {name}, which no checkpoint needs")

    def _named(self, module: Any, name: Any) -> Named:
        kind = f"{module}.{name}"
        if kind not in self.names:
            raise ValueError(f"names {kind[:100]!r}, which is nothing that a checkpoint holds: nothing of it was run")
        return Named(kind)

    def _add(self, into: Any, items: list[Any]) -> None:
        if isinstance(into, set):
            return  # nothing reads a set's items
        if not isinstance(into, list):
            raise ValueError("no sound pickle: an item for what is no list")
        into += items

    def _set(self, into: Any, pairs: list[Any]) -> None:
        if not isinstance(into, dict) or len(pairs) % 2:
            raise ValueError("no sound pickle: a key for what is no table")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, (str, int, Made)):  # their hashes do not recurse into contents
                raise ValueError("a key that no checkpoint has")
            into[key] = value
