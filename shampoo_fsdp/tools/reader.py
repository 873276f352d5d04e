"""Reading parts of a checkpoint in one process, without the state dict that was saved."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from shampoo_fsdp.checkpoint.safe_reader import SafeFileSystemReader, find_damage

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
        found = self._storage.read_metadata()
        if damage := _impossible_sizes(found):
            raise ValueError(f"{folder} cannot be read: {damage}.")
        self._storage.set_up_storage_reader(found, is_coordinator=True)
        self.metadata: Mapping[str, Any] = found.state_dict_metadata
        """What is known of each key without reading it."""
        self.rectangles = cache(self._rectangles)
        self._piece = lru_cache(maxsize=1)(self._storage.entry)  # one may have many blocks

    def is_tensor(self, key: str) -> bool:
        return isinstance(self.metadata[key], TensorStorageMetadata)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.metadata[key].size)

    def size_in_bytes(self, key: str) -> int:
        """The bytes of a tensor in memory."""
        return math.prod(self.shape(key)) * int(self.metadata[key].properties.dtype.itemsize)

    def value(self, key: str) -> Any:
        """Numbers, texts and lists of them; a tensor becomes such a list."""
        if self.is_tensor(key):
            shape = self.shape(key)
            if math.prod(max(n, 1) for n in shape) > _LONGEST:
                return _NO_VALUE
            return self.part(key, (0,) * len(shape), shape).tolist()
        try:
            return _for_people(self._storage.entry(key))
        except ValueError:  # what it holds is not needed
            return _NO_VALUE

    def part(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A rectangle of a tensor."""
        result = torch.zeros(tuple(sizes), dtype=self.metadata[key].properties.dtype)
        found = 0
        starts, lengths = self.rectangles(key).unbind(1)
        start = torch.tensor(tuple(offsets), dtype=torch.long)
        begins = starts.maximum(start)
        ends = (starts + lengths).minimum(start + torch.tensor(tuple(sizes), dtype=torch.long))
        for number in (begins < ends).all(1).nonzero().flatten().tolist():
            here, there = (
                tuple(map(slice, (begins[number] - of).tolist(), (ends[number] - of).tolist()))
                for of in (start, starts[number])
            )
            found += result[here].copy_(self._piece(key, number)[there]).numel()
        if found != result.numel():
            raise ValueError(f"the pieces of '{key}' overlap, or one is missing.")
        return result

    def _rectangles(self, key: str) -> Tensor:
        """Offsets and sizes of the pieces in which a tensor was saved: [pieces, 2, dimensions]."""
        chunks = self.metadata[key].chunks
        found = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks]
        shape = len(chunks), 2, len(self.shape(key))
        return torch.tensor(found, dtype=torch.long).reshape(shape)

    def nonfinite(self, key: str) -> int:
        """How many numbers of a tensor are NaN or infinite; reads it piece by piece."""
        parts = (self._storage.entry(key, i) for i in range(len(self.metadata[key].chunks)))
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


def _for_people(value: Any) -> Any:
    """What can be shown of a value: few bytes can be lists of any size, or steer a terminal."""
    parts = value if isinstance(value, list | tuple) else [value]
    if not all(part is None or type(part) in (bool, int, float, str) for part in parts):
        return _NO_VALUE
    if sum(len(repr(part)) for part in parts[:_LONGEST]) > _LONGEST or len(parts) > _LONGEST:
        return _NO_VALUE
    return value if all(part.isprintable() for part in parts if type(part) is str) else repr(value)


def _impossible_sizes(metadata: Metadata) -> str:
    """Tensors for which the files have too few bytes; "" if there are none."""
    stored = {(i.fqn, tuple(i.offset or ())): s.length for i, s in metadata.storage_data.items()}
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        for chunk in entry.chunks:
            needed = math.prod(chunk.sizes) * entry.properties.dtype.itemsize
            if needed > stored.get((key, tuple(chunk.offsets)), 0):
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
