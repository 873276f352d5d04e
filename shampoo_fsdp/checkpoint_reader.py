"""Reading parts of a checkpoint in one process, without the state dict that was saved."""

import math
import pickle
from collections import defaultdict
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from shampoo_fsdp.checkpoint import find_damage
from shampoo_fsdp.safe_reader import SafeFileSystemReader
from shampoo_fsdp.state import OwnedBlocks

__all__ = ["CheckpointReader"]


class CheckpointReader:
    """A checkpoint that `torch.distributed.checkpoint` has written.

    Raises:
        ValueError: says what is wrong with the folder.
    """

    def __init__(self, folder: Path) -> None:
        if damage := _what_is_wrong(folder):
            raise ValueError(f"{folder} cannot be read: {damage}.")
        self._storage = SafeFileSystemReader(folder)
        self._all = self._storage.read_metadata()
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
        planner = _SafePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(wanted, self._all, is_coordinator=True)
        self._storage.read_data(planner.create_local_plan(), planner).wait()


class _SafePlanner(DefaultLoadPlanner):
    """Does not run code that a file may contain."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        try:
            loaded = torch.load(value, weights_only=True)
        except pickle.UnpicklingError:
            loaded = "(no plain value)"
        self.state_dict[read_item.dest_index.fqn] = loaded


def _what_is_wrong(folder: Path) -> str:
    damage = find_damage(folder)
    if folder.is_dir() and not (folder / ".metadata").exists():
        inside = sorted(path.parent.name for path in folder.glob("*/.metadata"))
        if inside:
            return f"it holds the checkpoints {', '.join(inside)}; choose one of them"
        if not any(folder.glob("*.distcp")):
            return "there is no checkpoint in it"
    return damage
