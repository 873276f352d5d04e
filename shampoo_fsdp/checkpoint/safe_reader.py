"""Reading a checkpoint's files without running anything that they may ask for.

    dcp.load(state, storage_reader=SafeFileSystemReader(folder), planner=ShampooLoadPlanner())

The metadata of `torch.distributed.checkpoint` is a pickle, and a pickle names the functions that
are called when it is read. Here only the names that a checkpoint needs are known, and each stands
for a record that holds values and does nothing; the metadata is then put together from the values,
each of which must be of its own type.
"""

import collections
import dataclasses
import io
import os
import pickle
import pickletools
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

__all__ = ["SafeFileSystemReader", "UnsafeCheckpoint", "load_values", "without_code"]

_METADATA = metadata.__name__
_OLD_METADATA = "torch.distributed._shard.sharded_tensor.metadata"  # up to torch 2.3
_RECORDS = {
    *((_METADATA, cls.__name__) for cls in (BytesStorageMetadata, ChunkStorageMetadata, Metadata)),
    *((_METADATA, cls.__name__) for cls in (MetadataIndex, StorageMeta, TensorStorageMetadata)),
    (_METADATA, "TensorProperties"),
    (_OLD_METADATA, "TensorProperties"),
    (filesystem.__name__, "_StorageInfo"),
}
# Of these, none plays a part in loading.
_NOT_USED = {
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    (_OLD_METADATA, "MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
}
_MEMORY_FORMATS = ("TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT")
_PATHLIB = ("pathlib", "pathlib._local")
_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
_CONTAINERS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "deque"): collections.deque,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "bytearray"): bytearray,
    ("builtins", "complex"): complex,
}
_OWN_RISK = (
    "If you know who has written it, torch.serialization.add_safe_globals([...]) before loading "
    "allows it"
)


class UnsafeCheckpoint(ValueError):
    """A file that asks for what is no part of a checkpoint; nothing of it was run."""


class SafeFileSystemReader(FileSystemReader):
    """PyTorch's reader of checkpoint folders, for folders that may come from anybody.

    Args:
        path: of the folder; with "://" in it (`s3://...`) fsspec reaches it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        if "://" in str(path):
            from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

            self.fs = FsspecReader(path).fs
            self.path = path
            self.fs.fs.invalidate_cache()  # type: ignore[attr-defined]  # others write there too

    def size(self, name: str) -> int | None:
        """Of a file in the folder, in bytes; None if there is no such file."""
        path = self.fs.concat_path(self.path, name)
        if isinstance(path, Path):
            return path.stat().st_size if path.is_file() else None
        try:  # `exists` and `isfile` of fsspec may say no where the network has failed
            found = self.fs.fs.info(path)  # type: ignore[attr-defined]
        except FileNotFoundError:
            return None
        return int(found["size"]) if found["type"] == "file" else None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """
        Raises:
            UnsafeCheckpoint: names what the file asks for.
            ValueError: it is damaged.
        """
        path = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(path, "rb") as stream:
            data = stream.read()
        result = _metadata(_unpickle(data, _MetadataUnpickler, PurePosixPath(path).name))
        result.storage_meta = result.storage_meta or StorageMeta()
        result.storage_meta.load_id = self.load_id
        return result


def without_code(data: bytes, key: str) -> bytes:
    """A pickle of the same values that calls nothing, for those who unpickle what they are given.

    Args:
        key: of the entry, for the error.

    Raises:
        UnsafeCheckpoint: it holds more than values, tensors and what
            `torch.serialization.add_safe_globals` allows.
    """
    try:
        return pickle.dumps(_unpickle(data, _ValueUnpickler, repr(key)))
    except UnsafeCheckpoint as error:
        raise UnsafeCheckpoint(f"{error}. {_OWN_RISK}") from None


def load_values(stream: io.BytesIO, key: str) -> Any:
    """What `torch.save` has written: tensors, numbers, texts and containers of them.

    Args:
        key: of the entry, for the error.

    Raises:
        UnsafeCheckpoint: it holds something else, unless `torch.serialization.add_safe_globals`
            allows it.
        ValueError: it is damaged.
    """
    try:
        return torch.load(stream, weights_only=True)
    except pickle.UnpicklingError as error:
        stream.seek(0)
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(stream)
        except Exception:  # whatever the file makes of it
            names = []
        if not names:
            raise ValueError(f"{key!r} cannot be read ({_first_line(error)})") from None
        raise UnsafeCheckpoint(
            f"{key!r} asks for {', '.join(map(repr, sorted(names)))}, which is not a value; "
            f"nothing was run. {_OWN_RISK}"
        ) from None
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"{key!r} cannot be read ({_first_line(error)})") from None


class _NotKnown(Exception):
    """A name that a pickle asks for."""


class _Record:
    """The state of an object, and nothing that it can do."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _MetadataUnpickler(pickle.Unpickler):
    """Hands out nothing that lives longer than the reading: a pickle can set attributes, too."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return type(name, (_Record,), {})
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if module == "torch" and isinstance(found := vars(torch).get(name), torch.dtype):
            return found
        if (module, name) in _NOT_USED or (module in _PATHLIB and name in _PATHS):
            return lambda *arguments: None
        if (module, name) == ("builtins", "getattr"):
            return lambda owner, attribute: _member(attribute)
        raise _NotKnown(f"{module}.{name}")


def _member(name: str) -> None:
    """As Python 3.11 once pickled the members of an enum."""
    if name not in _MEMORY_FORMATS:
        raise _NotKnown("builtins.getattr")


class _ValueUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CONTAINERS:
            return _CONTAINERS[module, name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: torch._utils._rebuild_tensor_v2(*arguments)  # type: ignore[no-untyped-call]
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(io.BytesIO(data), weights_only=True)
        for allowed in torch.serialization.get_safe_globals():
            found, full_name = allowed if isinstance(allowed, tuple) else (allowed, "")
            if f"{module}.{name}" == (full_name or f"{found.__module__}.{found.__qualname__}"):
                return found
        raise _NotKnown(f"{module}.{name}")


def _unpickle(data: bytes, unpickler: type[_MetadataUnpickler | _ValueUnpickler], what: str) -> Any:
    try:
        # A few bytes can ask for a table of any size.
        for opcode, argument, _ in pickletools.genops(data):
            if "PUT" in opcode.name and int(argument or 0) > len(data):
                raise ValueError("it numbers more objects than it has bytes")
            if opcode.name == "DUP":  # no pickler writes it; few make a key that takes days to hash
                raise ValueError("it has an opcode that no checkpoint has, DUP")
        return unpickler(io.BytesIO(data)).load()
    except _NotKnown as name:
        raise UnsafeCheckpoint(
            f"{what} asks for {str(name)!r}, which is no part of a checkpoint; nothing was run"
        ) from None
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{what} cannot be read ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    (line, *_) = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {_printable(line)}"


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)


# -------------------------------------------------------------- metadata, from what was read of it


def _metadata(found: Any) -> Metadata:
    try:
        top = _state(found, Metadata)
        # One record may stand for many entries.
        records = {id(value): value for value in top["state_dict_metadata"].values()}
        made = {number: _entry(value) for number, value in records.items()}
        entries = {_name(k): made[id(value)] for k, value in top["state_dict_metadata"].items()}
        paths = {_name(k): _plain(value) for k, value in (top.get("planner_data") or {}).items()}
        meta = top.get("storage_meta")
        return Metadata(
            state_dict_metadata=entries,
            planner_data=paths,
            storage_data={_index(k): _storage(v) for k, v in top["storage_data"].items()},
            storage_meta=None if meta is None else _make(StorageMeta, _state(meta, StorageMeta)),
            version=_plain(top.get("version")),
        )
    except UnsafeCheckpoint:
        raise
    except Exception as error:
        raise ValueError(f".metadata cannot be read ({_first_line(error)})") from None


def _state(found: Any, *classes: type) -> Any:
    names = [cls.__name__ for cls in classes]
    if not (isinstance(found, _Record) and type(found).__name__ in names):
        raise TypeError(f"{type(found).__name__} where {' or '.join(names)} belongs")
    return found.state or {}


def _make(cls: type, state: Mapping[str, Any], **values: Any) -> Any:
    """Fields that the class does not have are those of a newer PyTorch."""
    for field in dataclasses.fields(cls):
        if field.name not in values and field.name in state:
            values[field.name] = _plain(state[field.name])
    return cls(**values)


def _entry(found: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    state = _state(found, TensorStorageMetadata, BytesStorageMetadata)
    if type(found).__name__ == BytesStorageMetadata.__name__:
        return BytesStorageMetadata()
    chunks = [
        ChunkStorageMetadata(offsets=_size(c["offsets"]), sizes=_size(c["sizes"]))
        for c in (_state(chunk, ChunkStorageMetadata) for chunk in state["chunks"])
    ]
    # Its other fields are those of the tensor that was saved and play no part in loading.
    dtype, *_ = _state(state["properties"], TensorProperties)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{type(dtype).__name__} where a dtype belongs")
    properties = TensorProperties(dtype=dtype)
    return TensorStorageMetadata(properties=properties, size=_size(state["size"]), chunks=chunks)


def _index(found: Any) -> MetadataIndex:
    state = _state(found, MetadataIndex)
    offset = state.get("offset")
    return MetadataIndex(
        _name(state["fqn"]), None if offset is None else _size(offset), _plain(state.get("index"))
    )


def _storage(found: Any) -> Any:
    state = _state(found, filesystem._StorageInfo)
    path = PurePosixPath(_name(state["relative_path"]))
    if path.is_absolute() or ".." in path.parts:
        raise UnsafeCheckpoint(f".metadata asks for the file {str(path)!r}, outside of the folder")
    _size((state["offset"], state["length"]))
    return _make(filesystem._StorageInfo, state)


def _size(found: Any) -> torch.Size:
    if not (isinstance(found, tuple) and all(type(n) is int and n >= 0 for n in found)):
        raise TypeError("something that is no size where a size belongs")
    return torch.Size(found)


def _name(found: Any) -> str:
    """Names are shown to people: none may steer a terminal."""
    if not (type(found) is str and found.isprintable()):
        raise TypeError("a name that is no printable text")
    return found


def _plain(found: Any) -> Any:
    parts = found if type(found) in (tuple, list) else (found,)
    if not all(part is None or type(part) in (bool, int, float, str) for part in parts):
        raise TypeError(f"{type(found).__name__} where a plain value belongs")
    return found
