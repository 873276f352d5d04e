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


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("checkpoints")
    group.addoption(
        "--all-pairs", action="store_true", help="load every mesh's checkpoint on every"
    )
    group.addoption("--crash-rounds", type=int, default=3, help="kill a training so many times")
    group.addoption(
        "--crash-saving", choices=("async", "disabled"), help="how it saves; else one or the other"
    )

    group.addoption(
        "--starts", type=int, default=3, help="take so many first steps beside other traffic"
    )

    group = parser.getgroup("random search")
    group.addoption(
        "--random-search",
        type=int,
        nargs="?",
        const=500,
        metavar="EXAMPLES",
        help="draw so many other examples for each test that draws; --hypothesis-seed repeats",
    )

    group.addoption(
        "--fuzz",
        type=_numbers,
        default="40",
        metavar="[FIRST:]END",
        help="the trainings with these numbers, of those that are drawn for several meshes",
    )

    group = parser.getgroup("GPUs")
    group.addoption(
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
