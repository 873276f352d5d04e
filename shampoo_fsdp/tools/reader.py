"""Reading parts of a checkpoint in one process, without the state dict that was saved."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from shampoo_fsdp.checkpoint.owned import OwnedBlocks
from shampoo_fsdp.checkpoint.planner import find_damage
from shampoo_fsdp.checkpoint.safe_reader import SafeFileSystemReader, load_values

__all__ = ["CheckpointReader"]

_NO_VALUE = "(no plain value)"
_LONGEST = 100_000  # numbers, or letters


class CheckpointReader:
    """A checkpoint that `torch.distributed.checkpoint` has written, or that claims to be one.

    Nothing of it is run, and no tensor takes more memory than its files have bytes.

    Raises:
        ValueError: says what is wrong with the folder.
    """

    def __init__(self, folder: Path) -> None:
        if damage := _what_is_wrong(folder):
            raise ValueError(f"{folder} cannot be read: {damage}.")
        self._storage = SafeFileSystemReader(folder)
        self._all = self._storage.read_metadata()
        if damage := _impossible_sizes(self._all, folder):
            raise ValueError(f"{folder} cannot be read: {damage}.")
        self._storage.set_up_storage_reader(self._all, is_coordinator=True)
        self.metadata: Mapping[str, Any] = self._all.state_dict_metadata
        """What is known of each key without reading it."""

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.metadata[key].size)

    def size_in_bytes(self, key: str) -> int:
        """Of a tensor."""
        return math.prod(self.shape(key)) * int(self.metadata[key].properties.dtype.itemsize)

    def value(self, key: str) -> Any:
        """Numbers, texts and lists of them; a tensor becomes such a list."""
        if isinstance(self.metadata[key], TensorStorageMetadata):
            if math.prod(self.shape(key)) > _LONGEST:
                return _NO_VALUE
            return self.part(key, (0,) * len(self.shape(key)), self.shape(key)).tolist()
        wanted: dict[str, Any] = {key: None}
        self._read(wanted)
        return wanted[key]

    def part(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A rectangle of a tensor."""
        dtype = self.metadata[key].properties.dtype
        result = torch.empty(tuple(sizes), dtype=dtype)
        self._read({key: OwnedBlocks(self.shape(key), [(tuple(offsets), result)], dtype)})
        return result

    def pieces(self, key: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Offsets and sizes of the pieces in which a tensor was saved, in row-major order."""
        chunks = self.metadata[key].chunks
        return sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks)

    def nonfinite(self, key: str) -> int:
        """How many numbers of a tensor are NaN or infinite; reads it piece by piece."""
        parts = (self.part(key, *piece) for piece in self.pieces(key))
        return sum(part.numel() - int(part.isfinite().sum()) for part in parts)

    def settings(self) -> dict[str, dict[str, Any]]:
        """The settings of parameter groups, by the name of the parameter."""
        by_owner: dict[str, dict[str, Any]] = defaultdict(dict)
        for key in self.metadata:
            prefix, found, rest = key.rpartition("param_groups.")
            if found and (not prefix or prefix.endswith(".")):
                owner, _, name = rest.rpartition(".")
                if name != "param_names":  # each parameter's has the names of its whole group
                    by_owner[owner][name] = self.value(key)
        # Where the state dict is not flattened, its groups are numbered and list their parameters.
        result = {}
        for owner, settings in by_owner.items():
            for name in settings.pop("params", [owner]):
                result[str(name)] = settings
        return result

    def _read(self, wanted: dict[str, Any]) -> None:
        planner = _ValuesPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(wanted, self._all, is_coordinator=True)
        try:
            self._storage.read_data(planner.create_local_plan(), planner).wait()
        except Exception as error:  # whatever a damaged file makes of it
            (line, *_) = str(error).splitlines() or [""]
            raise ValueError(
                f"{', '.join(map(repr, wanted))} cannot be read ({type(error).__name__}: {line})."
            ) from None


class _ValuesPlanner(DefaultLoadPlanner):
    """Does not run code that a file may contain."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        key = read_item.dest_index.fqn
        try:
            self.state_dict[key] = _for_people(load_values(value, key))
        except ValueError:
            self.state_dict[key] = _NO_VALUE


def _for_people(value: Any) -> Any:
    """Only what can be shown: a few bytes can say lists of any size, or steer a terminal."""
    parts = value if isinstance(value, list | tuple) else [value]
    if not all(part is None or type(part) in (bool, int, float, str) for part in parts):
        return _NO_VALUE
    if sum(len(repr(part)) for part in parts[:_LONGEST]) > _LONGEST or len(parts) > _LONGEST:
        return _NO_VALUE
    return value if all(part.isprintable() for part in parts if type(part) is str) else repr(value)


def _impossible_sizes(metadata: Metadata, folder: Path) -> str:
    """Tensors for which the files have too few bytes; "" if there are none."""
    claimed: dict[str, int] = defaultdict(int)
    stored: dict[tuple[str, tuple[int, ...]], float] = defaultdict(float)
    for index, info in metadata.storage_data.items():
        claimed[info.relative_path] += info.length
        # How much a compressed piece holds is not known before it is read.
        room = math.inf if info.transform_descriptors else info.length
        place = (index.fqn, tuple(index.offset or ()))
        stored[place] = max(room, stored[place])
    for name, length in claimed.items():
        if (size := (folder / name).stat().st_size) < length:
            return f"its entries take {length:,} bytes of {name}, which has {size:,}"
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        for chunk in entry.chunks:
            needed = math.prod(chunk.sizes) * entry.properties.dtype.itemsize
            if needed > stored[key, tuple(chunk.offsets)]:
                return f"a piece of '{key}' takes {needed:,} bytes, more than are stored for it"
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            return f"the pieces of '{key}' are not the whole of {list(entry.size)}"
    return ""


def _what_is_wrong(folder: Path) -> str:
    damage = find_damage(folder)
    if folder.is_dir() and not (folder / ".metadata").exists():
        inside = sorted(path.parent.name for path in folder.glob("*/.metadata"))
        if inside:
            return f"it holds the checkpoints {', '.join(inside)}; choose one of them"
        if not any(folder.glob("*.distcp")):
            return "there is no checkpoint in it"
    return damage
