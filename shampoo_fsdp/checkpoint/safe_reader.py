"""Reading the folder of a checkpoint without running anything that its files may ask for.

    dcp.load(state, storage_reader=SafeFileSystemReader(folder), planner=ShampooLoadPlanner())

The metadata of `torch.distributed.checkpoint` is a pickle; names that no metadata has are refused.
Entries are what PyTorch reads with `weights_only=True`.
"""

import collections
import contextlib
import io
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import _weights_only_unpickler as torchs_own
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

__all__ = ["SafeFileSystemReader", "UnsafeCheckpoint", "find_damage", "without_code"]

_METADATA = dcp_metadata.__name__
_OLD_METADATA = "torch.distributed._shard.sharded_tensor.metadata"  # up to torch 2.3
_ENUMS = (f"{_METADATA}._MEM_FORMAT_ENCODING", f"{_OLD_METADATA}.MEM_FORMAT_ENCODING")
_PATHS = ("PosixPath", "WindowsPath", "_local.PosixPath", "_local.WindowsPath")
_KNOWN: Mapping[str, Any] = {
    **torchs_own._get_allowed_globals(),
    **{f"{_METADATA}.{name}": vars(dcp_metadata)[name] for name in dcp_metadata.__all__},
    f"{_StorageInfo.__module__}._StorageInfo": _StorageInfo,
    f"{_OLD_METADATA}.TensorProperties": dcp_metadata.TensorProperties,
    "builtins.frozenset": frozenset,
    "collections.deque": collections.deque,
    "torch.storage._load_from_bytes": lambda data: torch.load(io.BytesIO(data), weights_only=True),
    # These play no part in loading. (Python 3.11 once pickled members of enums with getattr.)
    **dict.fromkeys(
        (*_ENUMS, "builtins.getattr"),
        lambda *_: dcp_metadata._MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT,
    ),
    **{f"pathlib.{name}": PurePosixPath for name in _PATHS},
}
"""What pickles may name: what PyTorch lets weights name, and what metadata do."""

_PythonsOwn: Any = pickle._Unpickler  # type: ignore[attr-defined, unused-ignore]


class UnsafeCheckpoint(ValueError):
    """A file that asks for what is no part of a checkpoint; nothing of it was run."""


class _Unpickler(_PythonsOwn):  # type: ignore[misc]
    """Python's own, as PyTorch's does not know the opcodes of metadata. It calls only what is
    known, and changes only what it has made of that."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        allowed: dict[str, Any] = torchs_own._get_user_allowed_globals()  # type: ignore[no-untyped-call]
        # PyTorch allows itself classes whose making is a collective: meshes.
        by_user = {name: known for name, known in allowed.items() if name[:6] != "torch."}
        self._known = {**by_user, **_KNOWN}
        self._types = {known for known in self._known.values() if isinstance(known, type)}

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full_name not in self._known:
            raise pickle.UnpicklingError(f"it asks for {full_name!r}")
        return self._known[full_name]

    def load_build(self) -> None:
        if type(self.stack[-2]) not in self._types:
            raise pickle.UnpicklingError("it changes what it has not made")
        super().load_build()

    dispatch = _PythonsOwn.dispatch | {pickle.BUILD[0]: load_build}


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Names what is read in errors, of which a damaged file may raise any."""
    try:
        yield
    except UnsafeCheckpoint:
        raise
    except Exception as error:
        # PyTorch's own says a page around it.
        cause = error.__context__ if isinstance(error, pickle.UnpicklingError) else None
        (said, *_) = str(cause or error).splitlines() or [""]
        said = (said if said.isprintable() else repr(said))[:300]
        if isinstance(error, pickle.UnpicklingError):
            raise UnsafeCheckpoint(
                f"{what} is damaged, or holds what is no part of a checkpoint; nothing was run "
                f"({said})"
            ) from None
        raise ValueError(f"{what} cannot be read ({type(error).__name__}: {said})") from None


def without_code(data: bytes, key: str) -> bytes:
    """A pickle of the same values that calls nothing, for those who unpickle what they are given.

    Args:
        key: of the entry, for the error.

    Raises:
        UnsafeCheckpoint: it holds something else than plain values and tensors, unless
            `torch.serialization.add_safe_globals` allows it.
        ValueError: it is damaged.
    """
    with _named(repr(key)):
        return pickle.dumps(_Unpickler(data).load())


class SafeFileSystemReader(FileSystemReader):
    """PyTorch's reader of checkpoint folders, for folders that may come from anybody.

    Entries that are no tensors are looked at before the planner unpickles them, so that any planner
    may be used.

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
        """The bytes of a file in the folder; None if there is no such file, but a pipe or the like.

        Raises:
            UnsafeCheckpoint: it is outside of the folder.
        """
        path = self.fs.concat_path(self.path, name)
        resolve = os.path.realpath if isinstance(path, Path) else os.path.normpath
        if not (real := str(resolve(path))).startswith(f"{resolve(self.path)}/"):
            raise UnsafeCheckpoint(
                f"{name!r} is {real!r}, outside of the folder, which was not read; in the place of "
                "a link put the file itself (cp -rL; snapshot_download with a local_dir)"
            )
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
            ValueError, FileNotFoundError: it is damaged, or files are missing or too short.
        """
        path = self._get_metadata_path(kwargs.get("rank"))
        name = os.path.basename(path)
        if self.size(name) is None:
            raise FileNotFoundError(
                f"it has no {name}, which is written last: saving it has not finished"
            )
        with _named(name), self.fs.create_stream(path, "rb") as stream:
            found: Metadata = _Unpickler(stream.read()).load()
            found.storage_meta = StorageMeta(load_id=self.load_id)
            self._entries = found.state_dict_metadata
            for key in found.state_dict_metadata:  # which people are shown
                if not key.isprintable():
                    raise ValueError(f"{key!r} is no printable text")
            ends = collections.Counter[str]()
            for info in found.storage_data.values():
                if info.transform_descriptors:
                    raise ValueError("it tells of entries that an extension has changed")
                ends[info.relative_path] = max(ends[info.relative_path], info.offset + info.length)
        for name, end in sorted(ends.items()):
            if (size := self.size(name)) is None:
                raise FileNotFoundError(f"{name} is missing or no file")
            if size < end:
                raise ValueError(f"{name} has {size:,} bytes, of which there should be {end:,}")
        return found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the entries of a plan, file after file.

        Raises:
            UnsafeCheckpoint, ValueError: names the entry or the file that is not what it should be.
        """
        of_file = collections.defaultdict(list)
        for item in plan.items:
            of_file[self.storage_data[item.storage_index].relative_path].append(item)
            if item.type == LoadItemType.BYTE_IO:
                self.entry(item.storage_index.fqn)
        for name, items in of_file.items():
            with _named(name):
                super().read_data(LoadPlan(items), planner)
        return super().read_data(LoadPlan([]), planner)

    def entry(self, key: str, piece: int | None = None) -> Any:
        """A piece of a tensor, by its number, or an entry that is no tensor.

        Raises:
            UnsafeCheckpoint, ValueError: as above.
        """
        chunk = None if piece is None else self._entries[key].chunks[piece]  # type: ignore[union-attr]
        offsets = chunk.offsets if chunk else None
        with _named(repr(key)):
            info = self.storage_data[MetadataIndex(key, offsets)]
            path = self.fs.concat_path(self.path, info.relative_path)
            with self.fs.create_stream(path, "rb") as stream:
                part = self._slice_file(stream, info)
                found = torch.load(part, map_location="cpu", weights_only=True)
            if chunk and found.shape != chunk.sizes:
                raise ValueError(
                    f".metadata says {list(chunk.sizes)}, there is {list(found.shape)}"
                )
        return found


def find_damage(folder: str | Path) -> str:
    """What is missing of a checkpoint, "" if nothing is; reads its metadata and the sizes of files.

    Args:
        folder: as `torch.distributed.checkpoint` has written it.
    """
    if Path(folder).is_file():
        return "it is a file; give the folder"
    try:
        reader = SafeFileSystemReader(folder)
        if not reader.fs.exists(folder):
            return "there is no such folder"
        reader.read_metadata()
    except Exception as error:  # whatever a remote file system raises
        return str(error) or repr(error)
    return ""
