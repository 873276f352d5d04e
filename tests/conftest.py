"""Settings of the whole test session."""

from pathlib import Path

import hypothesis
import pytest
import torch

import tests.arithmetic  # noqa: F401

# The tests' tensors are small: threads cost more than they give, and one thread makes the
# rounding of sums independent of the machine's number of cores.
torch.set_num_threads(1)

_CUDA = Path(__file__).parent / "cuda"
# A file that is long and comes last leaves a core idle.
_FIRST = ("meshes", "fuzz", "training", "checkpoint_crashes", "examples", "job")


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("shampoo_fsdp").addoption
    add("--all-pairs", action="store_true", help="load every mesh's checkpoint on every")
    add("--crash-rounds", type=int, default=3, help="kill a training so many times")
    add("--crash-saving", choices=("async", "disabled"), help="how it saves; else one or the other")
    add("--starts", type=int, default=3, help="take so many first steps beside other traffic")
    add(
        "--random-search",
        type=int,
        nargs="?",
        const=500,
        metavar="EXAMPLES",
        help="draw so many other examples for each test that draws; --hypothesis-seed repeats",
    )
    add(
        "--fuzz",
        type=_numbers,
        default="40",
        metavar="[FIRST:]END",
        help="the trainings with these numbers, of those that are drawn for several meshes",
    )
    add(
        "--cuda",
        nargs="?",
        const="cuda",
        choices=("cuda", "cpu"),
        help="run only the tests of GPUs; with 'cpu' on the CPU, which tests the tests",
    )


def _numbers(text: str) -> range:
    first, _, end = text.rpartition(":")
    return range(int(first or 0), int(end))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The tests of GPUs run alone or not at all."""
    if config.getoption("--cuda") is None:
        return True if _CUDA in (collection_path, *collection_path.parents) else None
    others = collection_path.is_file() and _CUDA not in collection_path.parents
    return True if others else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in _FIRST)


def pytest_configure(config: pytest.Config) -> None:
    """The default run draws the same examples every time; nothing depends on time or on luck."""
    common = {"database": None, "deadline": None, "print_blob": True}
    hypothesis.settings.register_profile("fixed", derandomize=True, max_examples=60, **common)
    examples = config.getoption("--random-search")
    if examples is None:
        hypothesis.settings.load_profile("fixed")
    else:
        hypothesis.settings.register_profile("search", max_examples=examples, **common)
        hypothesis.settings.load_profile("search")
