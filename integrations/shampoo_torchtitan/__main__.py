"""Says what there is: python -m shampoo_torchtitan."""

from shampoo_fsdp import __version__
from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS

_WITH_FUNCTIONS = """\
In a registry's function:

    from shampoo_torchtitan.configs import shampoo
    config.optimizer = shampoo(lr=1e-3)

or with any job, on its command line:

    --override.imports 'shampoo_torchtitan.configs.use_shampoo={"lr": 1e-3}'

or in a job file:
"""
_WITH_FILES = """
    [optimizer]
    name = "shampoo"
    lr = 1e-3                     # about 3 times AdamW's

    [optimizer.shampoo]           # what it has beside these: python -m shampoo_fsdp plan --help
    precondition_frequency = 10

Train:    torchrun --nproc_per_node 8 -m shampoo_torchtitan.train --job.config_file my_job.toml
Plan:     python -m shampoo_torchtitan.plan --job.config_file my_job.toml --world-size 64
Inspect:  python -m shampoo_fsdp inspect outputs/checkpoint/step-500
Settings: ... shampoo_torchtitan.train --job.config_file my_job.toml --help"""

if __name__ == "__main__":
    found = "0.3 or newer" if JOBS_ARE_FUNCTIONS else "0.2"
    print(f"Shampoo {__version__} for TorchTitan (found: {found}).\n")
    print((_WITH_FUNCTIONS if JOBS_ARE_FUNCTIONS else "In a job file:\n") + _WITH_FILES)
