"""Our own kernels on a GPU, against their references."""

import pytest

from tests.shampoo_fsdp.kernels.against_references import *  # noqa: F403

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _on_a_gpu(gpu):
    pass
