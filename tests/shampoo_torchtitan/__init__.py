import shampoo_torchtitan.train  # noqa: F401  first: it makes TorchTitan run without a GPU
from tests.ranks import preload

preload("shampoo_torchtitan.train", "torchtitan.models.llama3", "torchtitan.models.deepseek_v3")
