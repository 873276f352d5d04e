"""The slow, obvious form of the algorithms, in fp64: what the optimizer is compared with."""

from tests.reference.optimizer import ReferenceShampoo

__all__ = ["ReferenceShampoo"]
