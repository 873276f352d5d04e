"""torchrun, without its report where a bad setting ended the ranks: they have said what is wrong.

    python integrations/launch.py --nproc_per_node 2 -m shampoo_torchtitan.train

A script and not a module of the package, so that this process need not import TorchTitan.
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

_BAD_SETTING = 2  # the exit code of shampoo_torchtitan.train for it


def main() -> None:
    """Runs torchrun with this process's arguments; exits with 2 for a bad setting."""
    # Every failure that it logs is in the report as well.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    arguments = parse_args(sys.argv[1:])
    try:
        run(arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        report = f"{error}\nOutput of all ranks: {arguments.log_dir}"
        sys.exit(_BAD_SETTING if failure.exitcode == _BAD_SETTING else report)
    print(f"Output of all ranks: {arguments.log_dir}")


if __name__ == "__main__":
    main()
