"""Makes the stand-in in a folder: links to the installed TorchTitan, and one file of ours."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path


def main(folder: Path) -> None:
    """Replaces what is in the folder."""
    found = importlib.util.find_spec("torchtitan")
    assert found and found.submodule_search_locations
    (installed,) = found.submodule_search_locations
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(
        installed,
        folder / "torchtitan",
        copy_function=os.symlink,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    optimizers = folder / "torchtitan/components/optimizer"
    (optimizers / "optimizer.py").rename(optimizers / "optimizer_of_03.py")
    (optimizers / "optimizer.py").symlink_to(Path(__file__).with_name("optimizer.py").resolve())
    (optimizers / "__init__.py").unlink()
    (optimizers / "__init__.py").write_text(
        "from .lr_scheduler import *\n"
        "from .optimizer import *\n"
        "from .optimizer_of_03 import ParamGroupConfig, register_moe_load_balancing_hook\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
