"""Names that TorchTitan 0.3 has given to parameters of 0.2, for checkpoints from there."""

import dataclasses
import re
from collections.abc import Collection
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from shampoo_fsdp.checkpoint.safe_reader import SafeFileSystemReader

_RENAMED = (
    (r"^output\.", "lm_head."),
    (r"\.attention\.(w[qkv])\.", r".attention.qkv_linear.\1."),
    (r"\.moe\.expert_bias$", ".moe.expert_bias_E"),
    (r"\.moe\.experts\.(w[13])$", r".moe.routed_experts.inner_experts.\1_EFD"),
    (r"\.moe\.experts\.w2$", ".moe.routed_experts.inner_experts.w2_EDF"),
)


def name_in_03(name: str) -> str:
    """Of a parameter or buffer of 0.2; where attention is one matrix, of what its model saves."""
    for old, new in _RENAMED:
        name = re.sub(old, new, name)
    return name


class ReaderOfOldNames(SafeFileSystemReader):
    """Reads a checkpoint under the names that the job has now."""

    def __init__(self, folder: str, names: Collection[str]) -> None:
        """
        Args:
            names: Of the job's parameters, buffers and what else its model saves.
        """
        super().__init__(folder)
        self._names = set(names)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        found = super().read_metadata(*args, **kwargs)
        found.state_dict_metadata = {
            self._now(key): value for key, value in found.state_dict_metadata.items()
        }
        found.storage_data = {
            dataclasses.replace(index, fqn=self._now(index.fqn)): value
            for index, value in (found.storage_data or {}).items()
        }
        return found

    def _now(self, key: str) -> str:
        of_optimizer = re.fullmatch(r"(optimizer\.(?:state|param_groups)\.)(.+)(\.[^.]*)", key)
        prefix, name, entry = of_optimizer.groups() if of_optimizer else ("", key, "")
        now = name_in_03(name)
        return prefix + now + entry if name not in self._names and now in self._names else key
