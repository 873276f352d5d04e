import shampoo_torchtitan  # noqa: F401  before TorchTitan: without a GPU it cannot be imported alone
