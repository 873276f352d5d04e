"""Values from files of `torch.save` and from pickles, made without calling what they name."""

import collections
import io
import math
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from shampoo_fsdp.checkpoint.safe_pickle import UnsafeCheckpoint, first_line, records_of

__all__ = ["DTYPES", "load_values", "without_code"]

DTYPES = {str(x): x for x in vars(torch).values() if isinstance(x, torch.dtype)}
"""By the names that pickles have for them."""

_OWN_RISK = (
    "If you know who has written it, torch.serialization.add_safe_globals([...]) before loading "
    "allows it"
)
_PLAIN = {type(None), bool, int, float, str, bytes, bytearray}
_FAST_KEYS = {type(None), bool, float, str, bytes}
_MOST_SLOW_KEYS = 1_000
_DEEPEST = 100
_STORAGES = {
    f"torch.{name}": dtype
    for dtype, name in torch.storage._dtype_to_storage_type_map().items()  # type: ignore[no-untyped-call, unused-ignore]
} | {"torch.storage.UntypedStorage": torch.uint8}


def load_values(stream: io.BytesIO, key: str) -> Any:
    """What `torch.save` has written: tensors, numbers, texts and containers of them.

    Args:
        key: of the entry, for the error.

    Raises:
        UnsafeCheckpoint: it holds something else, unless `torch.serialization.add_safe_globals`
            allows it.
        ValueError: it is damaged or compressed, or would take far more room than it has bytes.
    """
    return _said(repr(key), lambda what: _saved(stream, what))


def without_code(data: bytes, key: str) -> bytes:
    """A pickle of the same values that calls nothing, for those who unpickle what they are given.

    Args:
        key: of the entry, for the error.

    Raises:
        UnsafeCheckpoint, ValueError: as above.
    """
    read = _said(repr(key), lambda what: _Values(len(data), {}, what).read(io.BytesIO(data)))
    return pickle.dumps(read)


def _said(what: str, read: Callable[[str], Any]) -> Any:
    try:
        return read(what)
    except UnsafeCheckpoint as error:
        raise UnsafeCheckpoint(f"{error}. {_OWN_RISK}") from None
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"{what} cannot be read ({first_line(error)})") from None


def _saved(stream: io.BytesIO, what: str) -> Any:
    files: dict[str, slice] = {}
    with zipfile.ZipFile(stream) as archive:
        for info in archive.infolist():
            name = info.filename.partition("/")[2]
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name!r} in it is compressed, as torch.save never does")
            stream.seek(info.header_offset + 26)
            begin = sum(struct.unpack("<HH", stream.read(4)), info.header_offset + 30)
            if begin + info.file_size > archive.start_dir:
                raise ValueError(f"{name!r} in it has fewer bytes than it should")
            files[name] = slice(begin, begin + info.file_size)
    data = stream.getbuffer()
    if bytes(data[files.get("byteorder", slice(0))]).decode() not in ("", sys.byteorder):
        raise ValueError("it is of a machine with another order of bytes")
    stream.seek(files["data.pkl"].start)
    size = files["data.pkl"].stop - files["data.pkl"].start
    return _Values(size, {name: data[place] for name, place in files.items()}, what).read(stream)


class _Values:
    """Makes a value of each record in a pickle, once."""

    def __init__(self, size: int, files: Mapping[str, memoryview], what: str) -> None:
        """
        Args:
            size: of the pickle, in bytes.
            files: the numbers of tensors among them.
            what: holds it, for the error.
        """
        self._files, self._what, self._allowed = files, what, _allowed_by_user()
        self._made: dict[int, tuple[Any, float]] = {}
        self._parts = 0.0
        self._most_parts = 40 * size + 100_000

    def read(self, stream: io.BytesIO) -> Any:
        return self._value(records_of(stream, _KNOWN | self._allowed.keys(), self._what), 0)

    def _value(self, raw: Any, depth: int) -> Any:
        """Counts parts as if each were written out wherever it is."""
        self._parts += 1
        if type(raw) in _PLAIN or raw == []:
            return raw
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
        if id(raw) in self._made:
            value, parts = self._made[id(raw)]
            self._parts += parts
        else:
            before = self._parts
            self._made[id(raw)] = None, math.inf  # as many as it has if it holds itself
            value = self._new(raw, depth + 1)
            self._made[id(raw)] = value, self._parts - before
        if self._parts > self._most_parts:
            raise ValueError("written out, it would be far longer than it is")
        return value

    def _new(self, raw: Any, depth: int) -> Any:
        if type(raw) in (list, tuple):
            return type(raw)(self._value(part, depth) for part in raw)
        name = raw.name
        if name == "storage":
            _, kind, key, *_ = raw.arguments
            return _flat(self._files[f"data/{key}"], kind.name)
        if raw.arguments is None:
            return DTYPES.get(name) or self._allowed[name]
        arguments = self._value(raw.arguments, depth)
        parts = [self._value(part, depth) for part in raw.parts]
        if arguments and (name in _CONTAINERS or name in _COPIES):
            self._parts += 10 * len(arguments[0])  # it is copied, and few bytes may ask for many
        if name in _CONTAINERS:
            return _container(_CONTAINERS[name], arguments, parts)
        if name in _CALLED:
            return _CALLED[name](*arguments)
        cls = self._allowed[name]
        made = cls.__new__(cls, *arguments) if raw.is_new else cls(*arguments)
        if parts:
            made.update(_pairs(parts)) if hasattr(made, "keys") else made.extend(parts)
        state = self._value(raw.state, depth)
        if hasattr(made, "__setstate__"):
            made.__setstate__(state)
        elif state is not None:
            vars(made).update(state)
        return made


def _allowed_by_user() -> dict[str, Any]:
    """PyTorch allows itself some of its own classes, which no value needs."""
    pairs = (
        allowed[::-1]
        if isinstance(allowed, tuple)
        else (f"{allowed.__module__}.{allowed.__qualname__}", allowed)
        for allowed in torch.serialization.get_safe_globals()
    )
    return {str(name): found for name, found in pairs if not str(name).startswith("torch.")}


def _container(cls: Callable[..., Any], arguments: Any, parts: list[Any]) -> Any:
    first, *others = arguments or ((),)
    if type(first) not in (list, tuple, dict):
        raise TypeError(f"a container of {type(first).__name__}")
    if cls is collections.deque:
        return cls([*first, *parts], *others)
    is_set = cls in (set, frozenset)
    content = [*(first.items() if type(first) is dict else first)]
    content += parts if is_set else _pairs(parts)
    # Keys of other kinds can be chosen so that each is compared with all before it.
    keys = content if is_set else (key for key, _ in content)
    if sum(not (type(k) in _FAST_KEYS or _is_small(k)) for k in keys) > _MOST_SLOW_KEYS:
        raise ValueError(f"it has over {_MOST_SLOW_KEYS:,} keys that are no texts or small numbers")
    return cls(content if is_set else dict(content))


def _pairs(parts: list[Any]) -> Any:
    return zip(parts[::2], parts[1::2], strict=True)


def _is_small(key: Any) -> bool:
    return type(key) is int and abs(key) < sys.hash_info.modulus


def _bytes(data: Any = b"", encoding: str = "latin1") -> bytes:
    """Bytes as Python writes them in protocols that have none."""
    if type(data) is str and encoding in ("latin1", "latin-1"):
        return data.encode(encoding)
    if type(data) is bytes:
        return data
    raise TypeError(f"bytes of {type(data).__name__}")


def _flat(data: memoryview, storage: str) -> Tensor:
    dtype = _STORAGES[storage]
    if not data:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(data) if data.readonly else data, dtype=dtype)


def _storage_alone(data: bytes) -> Tensor:
    """The storage of a tensor in a plain pickle: five pickles, how many numbers, and these."""
    stream = io.BytesIO(data)
    magic, _, _, storage, keys = (records_of(stream, _STORAGES, "a tensor") for _ in range(5))
    _, kind, key, *_ = storage.arguments
    if magic != torch.serialization.MAGIC_NUMBER or keys != [key]:
        raise ValueError("it holds a tensor in a form that is not known")
    return _flat(memoryview(data)[stream.tell() + 8 :], kind.name)


def _tensor(flat: Tensor, offset: int, size: Any, stride: Any, *others: Any) -> Tensor:
    _, _, *rest = others  # requires_grad, hooks
    if rest and isinstance(rest[0], torch.dtype):
        flat = flat.view(rest.pop(0))
    if any(rest):
        raise ValueError("it holds a tensor that is no plain one")
    if math.prod(torch.Size(size)) > flat.numel():
        raise ValueError(f"it says a tensor of {list(size)}, more numbers than are stored")
    return flat.as_strided(size, stride, offset)  # refuses what is not in there


_CONTAINERS: Mapping[str, Callable[..., Any]] = {
    "builtins.dict": dict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "collections.OrderedDict": collections.OrderedDict,
    "collections.Counter": collections.Counter,
    "collections.deque": collections.deque,
}
_COPIES: Mapping[str, Callable[..., Any]] = {
    "builtins.bytearray": lambda *arguments: bytearray(_bytes(*arguments)),
    "_codecs.encode": _bytes,
    "torch.storage._load_from_bytes": _storage_alone,
}
_CALLED: Mapping[str, Callable[..., Any]] = {
    **_COPIES,
    "builtins.complex": complex,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *others: data,
}
_KNOWN = {*_CONTAINERS, *_CALLED, *DTYPES, *_STORAGES}
