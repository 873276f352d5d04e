"""Pickles, read without calling what they name.

A pickle names the functions and classes that are called when it is read. Here a name is a text, and
what would be called is a :class:`Record` of it and of what it would be given. Who reads one makes
values of the records that are known. Whatever is in it, it takes a multiple of its bytes.
"""

import io
import pickle
from collections.abc import Container
from typing import Any

__all__ = ["Record", "UnsafeCheckpoint", "first_line", "records_of"]

# What Python and torch.save write; with others a few bytes can ask for a lot.
_OPCODES = """
    PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL
    REDUCE NEWOBJ BUILD BINPERSID NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT
    BINUNICODE SHORT_BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS
    EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET
""".split()  # noqa: SIM905
_LONGEST_LINE = 200
_NOTHING: list[Any] = []
_PythonsOwn: Any = pickle._Unpickler  # type: ignore[attr-defined, unused-ignore]


class UnsafeCheckpoint(ValueError):
    """A file that asks for what is no part of a checkpoint; nothing of it was run."""


class Record:
    """What a pickle would make of a name; it does nothing."""

    __slots__ = ("arguments", "is_new", "name", "parts", "state")

    def __init__(self, name: str, arguments: Any = None, is_new: bool = False) -> None:
        self.name = name
        self.arguments = arguments
        """None for the name itself."""
        self.is_new = is_new
        """Whether it would be made by __new__ alone."""
        self.state: Any = None
        self.parts: list[Any] = _NOTHING
        """What would be put into it; of a dict, each key and then its value."""

    def __setstate__(self, state: Any) -> None:
        if self.arguments is None:
            raise TypeError(f"it sets attributes of {self.name} itself")
        self.state = state

    def extend(self, parts: list[Any]) -> None:
        if self.parts is _NOTHING:
            self.parts = []
        self.parts.extend(parts)

    def add(self, part: Any) -> None:
        self.extend([part])

    append = add


class _Opcodes(dict[int, Any]):
    def __missing__(self, opcode: int) -> Any:
        raise ValueError(f"it has an opcode that no checkpoint has, {bytes([opcode])!r}")


class _Unpickler(_PythonsOwn):  # type: ignore[misc]
    """Python's own, in Python. It makes records and plain values, and hashes none."""

    def __init__(self, stream: io.BytesIO, known: Container[str], what: str) -> None:
        super().__init__(stream)
        self._known, self._what = known, what

    def find_class(self, module: str, name: str) -> Record:
        full_name = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full_name not in self._known:
            raise UnsafeCheckpoint(
                f"{self._what} asks for {full_name[:_LONGEST_LINE]!r}, which is no part of a "
                "checkpoint; nothing was run"
            )
        return Record(full_name)

    def persistent_load(self, pid: Any) -> Record:
        return Record("storage", pid)

    def load_reduce(self, is_new: bool = False) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        if not (type(arguments) is tuple and type(name) is Record and name.arguments is None):
            raise TypeError("it calls what is no name, or with what are no arguments")
        self.append(Record(name.name, arguments, is_new))  # no copy: few bytes may ask for many

    def load_newobj(self) -> None:
        self.load_reduce(is_new=True)

    def load_empty_dictionary(self) -> None:
        self.append(Record("builtins.dict", ()))

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].extend(items)

    def load_setitem(self) -> None:
        self.stack[-3].extend(self.stack[-2:])
        del self.stack[-2:]

    def load_empty_set(self) -> None:
        self.append(Record("builtins.set", ()))

    def load_frozenset(self) -> None:
        items = self.pop_mark()  # which changes self.append
        self.append(Record("builtins.frozenset", (items,)))

    def load_bytearray8(self) -> None:  # Python's makes room for as many as are promised
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch = _Opcodes()


for _opcode in (getattr(pickle, name)[0] for name in _OPCODES):
    _name = _PythonsOwn.dispatch[_opcode].__name__
    _Unpickler.dispatch[_opcode] = getattr(_Unpickler, _name)


def records_of(stream: io.BytesIO, known: Container[str], what: str) -> Any:
    """What a pickle holds: plain values, lists, tuples, and records of all else, dicts included.

    Args:
        stream: stands where the pickle begins, and then where it ends.
        known: the names that it may ask for.
        what: holds it, for the error.

    Raises:
        UnsafeCheckpoint: it asks for another name.
        Exception: of any kind, if it is damaged.
    """
    return _Unpickler(stream, known, what).load()


def first_line(error: Exception) -> str:
    """The first line of what an error says, short and printable."""
    (line, *_) = str(error).splitlines() or [""]
    line = line if line.isprintable() else repr(line)
    return f"{type(error).__name__}: {line[:_LONGEST_LINE]}"
