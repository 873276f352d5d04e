"""How many kernels an operator is on a GPU."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

__all__ = ["launches_of"]

# Operators that do nothing on the device: memory is only named or taken.
_NO_KERNEL = frozenset(
    {
        "_reshape_alias",
        "_unsafe_view",
        "alias",
        "detach",
        "device",
        "empty",
        "empty_like",
        "empty_strided",
        "lift_fresh",
        "new_empty",
        "new_empty_strided",
        "scalar_tensor",  # of a number in Python, which goes with the kernel that reads it
    }
)


def launches_of(func: Any, args: Sequence[Any], kwargs: Any) -> int:
    """One, or none of what only makes views. A `_foreach` operator is one if it is fused, else one
    for each tensor.

    It is fused if its tensors are dense, those of a list are of one type, and its lists agree in
    sizes and strides; and in types, unless it copies. (The kernels of one that is fused are more
    where tensors are many or very large: 64 tensors or 2^24 elements, about, make one.)
    """
    name = func.overloadpacket.__name__
    if func.is_view or name in _NO_KERNEL:
        return 0
    if not name.startswith("_foreach_"):
        return 1
    lists = list(_lists(args, kwargs))
    return 1 if _fused(lists, name.startswith("_foreach_copy")) else len(lists[0])


def _lists(args: Sequence[Any], kwargs: Any) -> Iterator[list[Tensor]]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
            yield list(value)


def _fused(lists: Sequence[Sequence[Tensor]], converts: bool) -> bool:
    types = [{t.dtype for t in tensors} for tensors in lists]
    alike = all(len(of) == 1 for of in types) and (converts or len(set.union(*types)) == 1)
    return alike and all(
        _is_dense(tensors[0])
        and all(t.shape == tensors[0].shape and t.stride() == tensors[0].stride() for t in tensors)
        for tensors in zip(*lists, strict=True)
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements are all of some part of memory, in any order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
