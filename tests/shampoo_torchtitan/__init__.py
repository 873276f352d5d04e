import shampoo_torchtitan.train  # noqa: F401  first: it makes TorchTitan run without a GPU
from tests.ranks import preload

preload("tests.shampoo_torchtitan.jobs", "torchtitan.models.llama3")
