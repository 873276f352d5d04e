"""Reading the tensors and values of a checkpoint, without the state dict that was saved."""

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from shampoo_fsdp.checkpoint.safe_reader import SafeFileSystemReader, find_damage

_NO_VALUE = "(no plain value)"
_LONGEST = 100_000  # numbers, or letters


class CheckpointReader:
    """A checkpoint that `torch.distributed.checkpoint` has written, or that claims to be one, of
    which nothing is run.

    Raises:
        ValueError: says what is wrong with the folder.
    """

    def __init__(self, folder: Path) -> None:
        if damage := _what_is_wrong(folder):
            raise ValueError(f"{folder} cannot be read: {damage}.")
        self._storage = SafeFileSystemReader(folder)
        found = self._storage.read_metadata()
        self._storage.set_up_storage_reader(found, is_coordinator=True)
        self.metadata: Mapping[str, Any] = found.state_dict_metadata
        """What is known of each key without reading it."""

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.metadata[key].size)

    def size_in_bytes(self, key: str) -> int:
        """The bytes of a tensor in memory."""
        return math.prod(self.shape(key)) * int(self.metadata[key].properties.dtype.itemsize)

    def tensor(self, key: str) -> Tensor:
        """A tensor, put together from the pieces in which it was saved."""
        entry = self.metadata[key]
        pieces = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        if pieces != math.prod(entry.size):
            raise ValueError(f"the pieces of '{key}' are not the whole of {list(entry.size)}.")
        result = torch.empty(entry.size, dtype=entry.properties.dtype)
        for number, chunk in enumerate(entry.chunks):
            ends = map(sum, zip(chunk.offsets, chunk.sizes, strict=True))
            where = tuple(map(slice, chunk.offsets, ends))
            result[where].copy_(self._storage.entry(key, number))
        return result

    def value(self, key: str) -> Any:
        """Numbers, texts and lists of them; a tensor becomes such a list."""
        try:
            if not isinstance(self.metadata[key], TensorStorageMetadata):
                return _for_people(self._storage.entry(key))
            few = math.prod(max(n, 1) for n in self.shape(key)) <= _LONGEST
            return self.tensor(key).tolist() if few else _NO_VALUE
        except ValueError:  # what it holds is not needed
            return _NO_VALUE

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
    plain = all(part is None or type(part) in (bool, int, float, str) for part in parts)
    letters = sum(len(part) for part in parts if type(part) is str)
    if not plain or len(parts) + letters > _LONGEST or not str(value).isprintable():
        return _NO_VALUE
    return value


def _what_is_wrong(folder: Path) -> str:
    damage = find_damage(folder)
    if folder.is_dir() and not (folder / ".metadata").exists():
        inside = sorted(path.parent.name for path in folder.glob("*/.metadata"))
        if inside:
            return f"it holds the checkpoints {', '.join(inside)}; choose one of them"
        if not any(folder.glob("*.distcp")):
            return "there is no checkpoint in it"
    return damage
