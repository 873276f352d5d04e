"""python -m shampoo_fsdp, see :mod:`shampoo_fsdp.tools.command`."""

import sys

from shampoo_fsdp.tools.command import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
