"""The slow, obvious form of the algorithms, in fp64: what the optimizer is compared with."""

from tests.reference.algebra import inverse_root, precondition
from tests.reference.optimizer import ReferenceShampoo
from tests.reference.views import block_slices, tile_sizes

__all__ = ["ReferenceShampoo", "block_slices", "inverse_root", "precondition", "tile_sizes"]
