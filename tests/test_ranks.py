"""The ranks themselves: a failure on one of them must never pass for success, nor hang."""

import os
import re
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
def test_parameters_and_fixtures_arrive(value: int, tmp_path: Path) -> None:
    assert value in (3, 4)
    (tmp_path / f"rank_{dist.get_rank()}").touch()
    dist.barrier()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rank_0", "rank_1"]


@ranks(4)
def test_ranks_communicate_and_have_one_thread() -> None:
    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total)
    assert total.item() == 6
    assert torch.get_num_threads() == 1


@ranks(2)
def test_environment_describes_the_rank() -> None:
    assert os.environ["RANK"] == os.environ["LOCAL_RANK"] == str(dist.get_rank())
    assert os.environ["WORLD_SIZE"] == "2"


@ranks(2, init=False)
def test_function_may_initialise_the_process_group() -> None:
    assert not dist.is_initialized()
    dist.init_process_group("gloo")  # from the environment
    assert dist.get_world_size() == 2


def scaled_rank(factor: torch.Tensor) -> torch.Tensor:
    return factor * dist.get_rank()


def test_values_return_by_rank() -> None:
    for n in (2, 3):
        values = run_ranks(n, scaled_rank, factor=torch.tensor([2.0]))
        assert values == [torch.tensor([2.0 * rank]) for rank in range(n)]


def test_environment_of_the_test_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SETTING", "of this test")
    assert run_ranks(1, read_setting) == ["of this test"]
    monkeypatch.delenv("A_SETTING")
    assert run_ranks(1, read_setting) == [None]


def read_setting() -> str | None:
    return os.environ.get("A_SETTING")


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


def test_all_failing_ranks_are_named_and_the_first_is_shown() -> None:
    with pytest.raises(RanksError, match="ranks 0, 1 of 2 failed; rank 1 was the first") as error:
        run_ranks(2, fail_everywhere)
    assert error.value.ranks == [0, 1]
    assert "from rank 1" in str(error.value)
    assert "from rank 0" not in str(error.value)


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(5)
    dist.barrier()


def test_death_of_a_rank_is_a_failure() -> None:
    with pytest.raises(
        RanksError, match=r"rank 1 was the first:\n\nthe process died with exit code 5"
    ):
        run_ranks(2, die_on_rank_1)


@ranks(2, timeout=4)
def hang_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)


def test_hang_ends_and_names_the_rank_and_its_place() -> None:
    start = time.monotonic()
    with pytest.raises(pytest.fail.Exception) as failure:
        hang_on_rank_1()
    assert time.monotonic() - start < 60
    message = str(failure.value)
    assert message.startswith("rank 1 of 2 did not finish within 4 s")
    assert re.search(r"test_ranks.py.*in hang_on_rank_1", message)


def ranks_process_id() -> int:
    return os.getpid()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_process_is_left() -> None:
    process_ids = run_ranks(2, ranks_process_id)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in process_ids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@ranks(2)
def skip_everywhere() -> None:
    pytest.skip("not here")


def test_skip_on_a_rank_skips_the_test() -> None:
    with pytest.raises(pytest.skip.Exception, match="not here"):
        skip_everywhere()


def test_local_functions_are_refused() -> None:
    def local() -> None:
        pass

    with pytest.raises(TypeError, match="move it to the top level"):
        run_ranks(1, local)


def test_arguments_that_cannot_be_sent_are_named() -> None:
    with pytest.raises(TypeError, match="the argument 'factor'"):
        run_ranks(1, scaled_rank, factor=lambda: None)
