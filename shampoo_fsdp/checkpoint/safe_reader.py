"""Reading the folder of a checkpoint without running anything that its files may ask for.

    dcp.load(state, storage_reader=SafeFileSystemReader(folder), planner=ShampooLoadPlanner())

The metadata of `torch.distributed.checkpoint` is a pickle. It is put together anew from the values
in it, each of which must be of its own type, and what it promises must be in the files.
"""

import contextlib
import io
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from shampoo_fsdp.checkpoint.safe_pickle import Record, UnsafeCheckpoint, first_line, records_of
from shampoo_fsdp.checkpoint.safe_values import DTYPES, load_values

__all__ = ["SafeFileSystemReader"]

_METADATA = "torch.distributed.checkpoint.metadata"
_OLD_METADATA = "torch.distributed._shard.sharded_tensor.metadata"  # up to torch 2.3
_SAVED: tuple[type, ...] = (
    *(BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex),
    *(StorageMeta, TensorProperties, TensorStorageMetadata, _StorageInfo),
)
_CLASSES = {f"{cls.__module__}.{cls.__name__}": cls for cls in _SAVED}
_CLASSES[f"{_OLD_METADATA}.TensorProperties"] = TensorProperties
_KNOWN = {
    *_CLASSES,
    *DTYPES,
    "torch.Size",
    # These play no part in loading.
    f"{_METADATA}._MEM_FORMAT_ENCODING",
    f"{_OLD_METADATA}.MEM_FORMAT_ENCODING",
    "torch.serialization._get_layout",
    "builtins.getattr",  # as Python 3.11 once pickled the members of an enum
    *(f"pathlib.{cls}" for cls in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    *(f"pathlib._local.{cls}" for cls in ("PosixPath", "WindowsPath")),
}
_LONGEST_NAME = 1_000
_MOST_NUMBERS = 64
"""Dimensions of a tensor, or parts of a path in a state dict."""


class SafeFileSystemReader(FileSystemReader):
    """PyTorch's reader of checkpoint folders, for folders that may come from anybody.

    Each entry is given to the planner without what is no value, so that any planner may be used.
    Entries that an extension has changed (compressed, say) are not read.

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
        """The bytes of a file in the folder; None if there is no such file."""
        path = self._place(name)
        if isinstance(path, Path):
            return path.stat().st_size if path.is_file() else None
        try:  # `exists` and `isfile` of fsspec may say no where the network has failed
            found = self.fs.fs.info(path)  # type: ignore[attr-defined]
        except FileNotFoundError:
            return None
        return int(found["size"]) if found["type"] == "file" else None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read what the checkpoint says of its entries.

        Raises:
            UnsafeCheckpoint: names what the file asks for.
            ValueError: it is damaged.
        """
        rank = kwargs.get("rank")
        name = ".metadata" if rank is None else f"__{rank}.metadata"
        with self.opened(name) as stream:
            data = io.BytesIO(stream.read())
        try:
            result = _metadata(records_of(data, _KNOWN, name))
        except UnsafeCheckpoint:
            raise
        except Exception as error:  # a damaged pickle may raise anything
            raise ValueError(f"{name} cannot be read ({first_line(error)})") from None
        result.storage_meta = StorageMeta(load_id=self.load_id)
        return result

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._entries = metadata.state_dict_metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the entries of a plan, file after file.

        Raises:
            UnsafeCheckpoint: names the entry and what it asks for.
            ValueError: names the entry that is damaged, or is not what the metadata says.
        """
        items = sorted(plan.items, key=self._file_of)
        for name, of_file in itertools.groupby(items, self._file_of):
            with self.opened(name) as stream:
                for item in of_file:
                    found = self._found(stream, item.storage_index)
                    if item.type == LoadItemType.BYTE_IO:
                        clean = io.BytesIO()
                        torch.save(found, clean)
                        clean.seek(0)
                        planner.load_bytes(item, clean)
                    else:
                        target = planner.resolve_tensor(item).detach()
                        lengths = zip(item.storage_offsets, item.lengths, strict=True)
                        target.copy_(found[tuple(slice(start, start + n) for start, n in lengths)])
                        planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def entry(self, key: str, piece: int | None = None) -> Any:
        """A piece of a tensor, by its number, or an entry that is no tensor.

        Raises:
            UnsafeCheckpoint, ValueError: as above.
        """
        chunks = getattr(self._entries[key], "chunks", ())
        index = MetadataIndex(key, None if piece is None else chunks[piece].offsets, piece)
        with self.opened(self.storage_data[index].relative_path) as stream:
            return self._found(stream, index)

    def _file_of(self, item: ReadItem) -> str:
        return str(self.storage_data[item.storage_index].relative_path)

    def _found(self, stream: IO[bytes], index: MetadataIndex) -> Any:
        info, entry = self.storage_data[index], self._entries[index.fqn]
        if (end := info.offset + info.length) > (size := stream.seek(0, io.SEEK_END)):
            raise ValueError(
                f"{info.relative_path} has {size:,} bytes, of which there should be {end:,}"
            )
        stream.seek(info.offset)
        found = load_values(io.BytesIO(stream.read(info.length)), index.fqn)
        if isinstance(entry, TensorStorageMetadata):
            chunk = entry.chunks[index.index or 0]  # PyTorch's plans have its number
            told = f"{list(chunk.sizes)} of {entry.properties.dtype}"
            here = f"{list(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else "none"
            if here != told:
                raise ValueError(
                    f"{index.fqn!r} cannot be read: .metadata says a tensor {told}, "
                    f"{info.relative_path} has {here}"
                )
        return found

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[IO[bytes]]:
        """A file of the folder.

        Raises:
            UnsafeCheckpoint: it is a link out of it.
            FileNotFoundError: it is missing, or no file, such as a pipe, which might never end.
        """
        if self.size(name) is None:
            raise FileNotFoundError(f"{name} is missing or no file")
        with self.fs.create_stream(self._place(name), "rb") as stream:
            yield cast(IO[bytes], stream)

    def _place(self, name: str) -> str | os.PathLike[str]:
        path = self.fs.concat_path(self.path, name)
        if isinstance(path, Path):
            real = Path(os.path.realpath(path))
            if not real.is_relative_to(os.path.realpath(self.path)):
                raise UnsafeCheckpoint(
                    f"{name} is a link to {str(real)!r}, outside of the folder, which was not "
                    "read; if it is yours, put the file itself there: cp -rL does so, and "
                    "Hugging Face's snapshot_download with a local_dir"
                )
        return path


# -------------------------------------------------------------- metadata, from what was read of it


def _metadata(found: Any) -> Metadata:
    top = _fields(found, Metadata)
    stored = {_index(index): _storage(info) for index, info in _pairs(top["storage_data"])}
    ends = sorted((s.relative_path, s.offset, s.offset + s.length) for s in stored.values())
    for (path, _, end), (other, begin, other_end) in itertools.pairwise(ends):
        if path == other and begin < min(end, other_end):
            raise ValueError(f"two entries are said to be in the same bytes of {path}")
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    room = len(stored)
    for key, value in _pairs(top["state_dict_metadata"]):
        # One list of pieces may stand for many entries.
        entries[_name(key)] = entry = _entry(value, room)
        offsets = [c.offsets for c in entry.chunks] if hasattr(entry, "chunks") else [None]
        if not all(MetadataIndex(key, place) in stored for place in offsets):
            raise ValueError(f"it does not say where {key!r} is stored")
        room -= len(offsets)
    return Metadata(
        state_dict_metadata=entries,
        planner_data={_name(k): _plain(v) for k, v in _pairs(top.get("planner_data"))},
        storage_data=stored,
        version=_plain(top.get("version")),
    )


def _pairs(found: Any) -> Iterable[tuple[Any, Any]]:
    if found is None:
        return ()
    if not (type(found) is Record and found.name == "builtins.dict"):
        raise TypeError(f"{_kind(found)} where a dict belongs")
    return zip(found.parts[::2], found.parts[1::2], strict=True)


def _fields(found: Any, *classes: type) -> dict[str, Any]:
    """Those that the class does not have are of a newer PyTorch."""
    return {_name(name): value for name, value in _pairs(_state(found, *classes))}


def _state(found: Any, *classes: type) -> Any:
    if not (type(found) is Record and _CLASSES.get(found.name) in classes):
        raise TypeError(f"{_kind(found)} where {classes[0].__name__} belongs")
    return found.state


def _kind(found: Any) -> str:
    return found.name if type(found) is Record else type(found).__name__


def _entry(found: Any, most_pieces: int) -> TensorStorageMetadata | BytesStorageMetadata:
    state = _fields(found, TensorStorageMetadata, BytesStorageMetadata)
    if _CLASSES[found.name] is BytesStorageMetadata:
        return BytesStorageMetadata()
    if len(state["chunks"]) > most_pieces:
        raise ValueError("it tells of more pieces of tensors than are stored")
    chunks = [
        ChunkStorageMetadata(offsets=_size(c["offsets"]), sizes=_size(c["sizes"]))
        for c in (_fields(chunk, ChunkStorageMetadata) for chunk in state["chunks"])
    ]
    size = _size(state["size"])
    for chunk in chunks:
        sides = zip(chunk.offsets, chunk.sizes, size, strict=True)
        if any(start + length > whole for start, length, whole in sides):
            raise ValueError("it tells of a piece of a tensor that is not inside of it")
    # Its other fields are those of the tensor that was saved and play no part in loading.
    dtype, *_ = _state(state["properties"], TensorProperties)
    properties = TensorProperties(dtype=DTYPES[dtype.name])
    return TensorStorageMetadata(properties=properties, size=size, chunks=chunks)


def _index(found: Any) -> MetadataIndex:
    state = _fields(found, MetadataIndex)
    offset = state.get("offset")
    return MetadataIndex(_name(state["fqn"]), None if offset is None else _size(offset))


def _storage(found: Any) -> _StorageInfo:
    state = _fields(found, _StorageInfo)
    path = PurePosixPath(_name(state["relative_path"]))
    if path.is_absolute() or ".." in path.parts:
        raise UnsafeCheckpoint(
            f".metadata asks for the file {str(path)!r}, outside of the folder; it was not read"
        )
    if state.get("transform_descriptors"):
        raise ValueError("it tells of entries that an extension has changed or compressed")
    return _StorageInfo(str(path), *_size((state["offset"], state["length"])))


def _size(found: Any) -> torch.Size:
    if type(found) is Record and found.name == "torch.Size" and found.arguments:
        (found,) = found.arguments
    if not (
        type(found) in (tuple, list)
        and len(found) <= _MOST_NUMBERS
        and all(type(n) is int and 0 <= n < 2**63 for n in found)
    ):
        raise TypeError("something that is no size where a size belongs")
    return torch.Size(found)


def _name(found: Any) -> str:
    """Names are shown to people: none may steer a terminal."""
    if not (type(found) is str and len(found) <= _LONGEST_NAME and found.isprintable()):
        raise TypeError(f"a name that is no printable text of up to {_LONGEST_NAME} letters")
    return found


def _plain(found: Any) -> Any:
    parts = found if type(found) in (tuple, list) else (found,)
    if len(parts) > _MOST_NUMBERS:
        raise ValueError("a path of too many parts")
    if not all(part is None or type(part) in (bool, int, float, str) for part in parts):
        raise TypeError(f"{_kind(found)} where a plain value belongs")
    return found
