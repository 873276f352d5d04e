"""What kernels and transfers take by assumed rates, in milliseconds."""

import pytest

from shampoo_fsdp.tools.machine import Machine

MACHINE = Machine(bf16=500.0, tf32=250.0, bandwidth=2.0, launch=4.0, node=200.0, network=50.0)


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        ({"bf16": 5e12, "launches": 1}, 10.0),
        ({"bf16": 5e11, "tf32": 5e11, "launches": 1}, 1.0 + 2.0),
        ({"bytes": 2e9, "launches": 1}, 1.0),
        ({"bf16": 5e12, "bytes": 2e9, "launches": 1}, 10.0),  # a product hides what it reads
        ({"bf16": 5e11, "bytes": 4e9, "launches": 1}, 2.0),
        ({"bytes": 8, "launches": 250}, 1.0),  # small kernels take 4 us each
        ({"eigh": 2 * 1024**1.5, "launches": 1}, 2 * 12.0),
        ({"qr": 256**1.5, "launches": 1}, 4.7 / 8),
    ],
)
def test_kernels(work, expected):
    assert MACHINE.milliseconds(work) == pytest.approx(expected)


def test_a_transfer_takes_as_long_as_the_slower_of_both_ways():
    assert MACHINE.transfer(near=2e8, far=0.0) == pytest.approx(1.0)
    assert MACHINE.transfer(near=2e8, far=1e8) == pytest.approx(2.0)
