"""Where the tests of GPUs run: `./run_tests.sh --cuda`, or `--cuda cpu` to test the tests."""

import os

import pytest
import torch

# Otherwise asking whether there is a GPU would keep forked ranks from using it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# Otherwise cuBLAS may round differently from run to run while several streams are busy.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_runtest_setup(item: pytest.Item) -> None:
    chosen = item.config.getoption("--cuda")
    if item.get_closest_marker("cuda") and chosen == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the test computes."""
    return torch.device(request.config.getoption("--cuda"))


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """The same for tests that mean nothing on a CPU."""
    if device.type != "cuda":
        pytest.skip("only a GPU has streams, and a host that may wait for it")
    return device


@pytest.fixture(params=["one", "all"])
def ranks(request: pytest.FixtureRequest, device: torch.device) -> int:
    """How many there are."""
    if request.param == "one":
        return 1
    if device.type == "cpu":
        return 2
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here; ranks that communicate need two")
    return torch.cuda.device_count()
