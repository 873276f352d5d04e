import shampoo_torchtitan.train  # noqa: F401  first: it makes TorchTitan run without a GPU
