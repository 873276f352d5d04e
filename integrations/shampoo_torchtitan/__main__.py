"""Shampoo for TorchTitan.

From 0.3 on, in a registry's function:

    from shampoo_torchtitan.configs import shampoo
    config.optimizer = shampoo(lr=3e-4)

(from 0.4 on also Shampoo.Config(pattern=".*", lr=3e-4) of this package, in its list of optimizers),
or with any job, on its command line:

    --override.imports shampoo_torchtitan.configs.use_shampoo

In a job file, for 0.2 and later:

    [optimizer]
    name = "shampoo"
    lr = 3e-4                     # AdamW's

    [optimizer.shampoo]           # its own settings: python -m shampoo_fsdp plan --help
    precondition_frequency = 10

Train:    torchrun --nproc_per_node 8 -m shampoo_torchtitan.train --job.config_file my_job.toml
Plan:     python -m shampoo_torchtitan.plan --job.config_file my_job.toml --world-size 64
Inspect:  python -m shampoo_fsdp inspect outputs/checkpoint/step-500
Settings: python -m shampoo_torchtitan.train --job.config_file my_job.toml --help"""

if __name__ == "__main__":
    print(__doc__)
