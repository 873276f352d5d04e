"""The ranks themselves: a failure on one of them must never pass for success, nor hang."""

import os
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import tests.ranks
from tests.ranks import RanksError, ranks, run_ranks


@ranks(2)
@pytest.mark.parametrize("value", [3, 4])
def test_parameters_fixtures_and_an_environment_arrive(value: int, tmp_path: Path) -> None:
    assert value in (3, 4)
    (tmp_path / f"rank_{dist.get_rank()}").touch()
    dist.barrier()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rank_0", "rank_1"]
    assert os.environ["RANK"] == os.environ["LOCAL_RANK"] == str(dist.get_rank())
    assert os.environ["WORLD_SIZE"] == "2"
    assert torch.get_num_threads() == 1


def scaled_rank(factor: torch.Tensor) -> tuple[torch.Tensor, int]:
    return factor * dist.get_rank(), os.getpid()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_values_return_by_rank_and_no_process_is_left() -> None:
    values, process_ids = zip(*run_ranks(3, scaled_rank, factor=torch.tensor([2.0])), strict=True)
    assert list(values) == [torch.tensor([2.0 * rank]) for rank in range(3)]
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in process_ids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@ranks(3)
def fail_on_rank_1(expected: int) -> None:
    if dist.get_rank() == 1:
        number = expected + 1
        assert number == expected
    dist.barrier()  # the others wait for a rank that never comes


def test_failure_on_one_rank_fails_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tests.ranks, "_GRACE_S", 0.3)  # the others report nothing, ever
    with pytest.raises(pytest.fail.Exception) as failure:
        fail_on_rank_1(expected=6)
    message = str(failure.value)
    assert message.startswith("rank 1 of 3 failed (ranks 0, 2 had not finished); rank 1 was")
    assert "in fail_on_rank_1" in message  # the traceback
    assert "assert 7 == 6" in message  # with values


def fail_everywhere() -> None:
    dist.barrier()
    time.sleep(0.3 * (dist.get_rank() == 0))
    raise ValueError(f"from rank {dist.get_rank()}")


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(5)
    dist.barrier()


def hang_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (fail_everywhere, "ranks 0, 1 of 2 failed; rank 1 was the first(?s:.*)from rank 1"),
        (die_on_rank_1, r"rank 1 was the first:\n\nthe process died with exit code 5"),
        (
            hang_on_rank_1,
            "^rank 1 of 2 did not finish within 4 s(?s:.*)test_ranks.py.*in hang_on_rank_1",
        ),
    ],
)
def test_the_first_that_fails_dies_or_hangs_is_shown(function, said) -> None:
    start = time.monotonic()
    with pytest.raises(RanksError, match=said) as error:
        run_ranks(2, function, timeout=4 if function is hang_on_rank_1 else 120)
    assert "from rank 0" not in str(error.value) and time.monotonic() - start < 60
